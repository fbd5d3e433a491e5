"""Membership of the cluster: only the manager sends it; every other process follows it in the same way.

The manager sends the whole membership on every change and as a heartbeat, so the next message makes up for a
lost one. While the manager is absent, every process keeps the last membership that it received.
"""

import asyncio
import hashlib
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from migration.engine_interface import EngineFacts

#: Names of the manager and the scheduler on the wire.
MANAGER = "manager"
SCHEDULER = "scheduler"


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """A started instance. These values do not change until the instance ends.

    Attributes:
        role: The role at the start; load reports have the present role.
        address: The instance receives messages there.
    """

    instance_id: str
    role: str
    address: str
    node: str
    pid: int
    engine: EngineFacts


class ApiServerInfo(msgspec.Struct, frozen=True):
    """Addresses at which an API server receives messages and tokens, and its process id.

    Attributes:
        joined: Set by the manager, and a new one whenever the API server was no member before. By this it
            learns that it had been dropped, and that the instances have ended its requests.
    """

    address: str
    token_endpoint: str
    joined: str = ""
    pid: int = 0


class LoraAdapter(msgspec.Struct, frozen=True):
    """A LoRA adapter that the cluster serves.

    Attributes:
        name: Clients name it as the model.
        path: Directory, on every node, or name on a hub.
        base_model: Served name of the model that it is listed under; None for the first one.
        is_3d: See vLLM's `LoRARequest.is_3d_lora_weight`.
    """

    name: str
    path: str
    base_model: str | None = None
    is_3d: bool = False

    @property
    def number(self) -> int:
        """Engines know an adapter by this. It follows from name and path, so that it is the same everywhere;
        31 bits, which is what vLLM's second model runner keeps.
        """
        digest = hashlib.sha256(f"{self.name}\0{self.path}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % (2**31 - 1) + 1

    @property
    def for_engine(self) -> tuple[str, int, str, str | None, bool]:
        """The fields of vLLM's `LoRARequest` that an engine needs, in order, without `load_inplace`.

        vLLM keeps one adapter of a name in a batch. With the path in it, requests that use the former one go
        on when an adapter is replaced.
        """
        return f"{self.name}@{self.path}", self.number, self.path, self.base_model, self.is_3d


class Join(msgspec.Struct, frozen=True, tag=True):
    """API server → manager: the sender joins the cluster. Repeated as a heartbeat.

    Attributes:
        unused: Instances of `Membership.leaving` on which the sender has no requests, and to which it will
            send none.
        term: Term of the last membership that the sender has applied; 0 before the first one.
    """

    info: ApiServerInfo
    unused: list[str]
    term: int = 0


class ApiServerStatus(msgspec.Struct, frozen=True, tag=True):
    """API server → API server: what the sender has.

    Attributes:
        requests: Requests in progress.
        waiting: Those of them without a first token, and those that arrive.
        line_requests, line_tokens: Requests in its waiting line, and the tokens of their prompts.
        connections: Open connections of clients.
        pages: Open live pages.
        slo_requests, slo_met: Requests with targets that have ended lately, and those that have met theirs;
            see `pd_serve.observe.attainment`.
    """

    requests: int = 0
    waiting: int = 0
    line_requests: int = 0
    line_tokens: int = 0
    connections: int = 0
    pages: int = 0
    slo_requests: int = 0
    slo_met: int = 0


class Membership(msgspec.Struct, frozen=True, tag=True):
    """Manager → every other process: all members.

    Attributes:
        term: Term of the manager. A manager that takes over has a higher term; messages of earlier terms are
            ignored.
        address: The manager receives messages there.
        leaving: Instances that are stopped as soon as they are empty.
        starting: Number of instances that are being started, by role.
        scheduler: The scheduler's address; "" if there is none.
        lora_adapters: Those that API servers offer to clients.
    """

    term: int
    address: str
    instances: list[InstanceInfo] = []
    leaving: list[str] = []
    starting: dict[str, int] = {}
    scheduler: str = ""
    api_servers: dict[str, ApiServerInfo] = {}
    lora_adapters: list[LoraAdapter] = []


@dataclass(frozen=True, slots=True)
class MembershipChange:
    """The changes by one membership message; `api_servers_left` by name."""

    joined: list[InstanceInfo] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    api_servers_left: dict[str, ApiServerInfo] = field(default_factory=dict)


class PeerConnections(Protocol):
    """The part of `pd_serve.comm.wire.Wire` that membership needs."""

    def connect(self, peer: str, address: str) -> None: ...
    def disconnect(self, peer: str) -> None: ...


class MembershipView:
    """One process's view of the membership. Keeps its wire connected to all other members.

    Args:
        name: Name of this process.

    Attributes:
        instances, api_servers: Members by id or name, including this process if it is one of them.
        latest: The last message; None before the first one.
        received_at: Arrival of the last message, on the event loop's clock.
    """

    def __init__(self, name: str, wire: PeerConnections) -> None:
        self._name = name
        self._wire = wire
        self._loop = asyncio.get_running_loop()
        self.instances: dict[str, InstanceInfo] = {}
        self.api_servers: dict[str, ApiServerInfo] = {}
        self.latest: Membership | None = None
        self.received_at = self._loop.time()

    def has_peer(self, instance_id: str) -> bool:
        """Whether another instance of this id is a member."""
        return instance_id in self.instances and instance_id != self._name

    def is_far(self, instance_id: str) -> bool:
        """Whether an instance runs on another machine than this one, as far as both are members."""
        here, there = self.instances.get(self._name), self.instances.get(instance_id)
        return here is not None and there is not None and here.node != there.node

    def update(self, message: Membership) -> MembershipChange | None:
        """Applies a message of the manager. Returns None if its term is an earlier one, and ignores it."""
        if self.latest is not None and message.term < self.latest.term:
            return None
        is_heartbeat = message == self.latest
        self.latest, self.received_at = message, self._loop.time()
        self._wire.connect(MANAGER, message.address)
        if is_heartbeat:
            return MembershipChange()
        instances = {info.instance_id: info for info in message.instances}
        change = MembershipChange(
            joined=[info for name, info in instances.items() if self.instances.get(name) != info],
            left=[name for name, info in self.instances.items() if instances.get(name) != info],
            api_servers_left={
                name: info
                for name, info in self.api_servers.items()
                if message.api_servers.get(name, info) != info or name not in message.api_servers
            },
        )
        self.instances, self.api_servers = instances, dict(message.api_servers)
        self._connect(change)
        return change

    def _connect(self, change: MembershipChange) -> None:
        assert self.latest is not None
        for gone in (*change.left, *change.api_servers_left):
            self._wire.disconnect(gone)
        members = {name: info.address for name, info in self.instances.items()}
        members |= {name: info.address for name, info in self.api_servers.items()}
        members.pop(self._name, None)
        for name, address in members.items():
            self._wire.connect(name, address)
        if not self.latest.scheduler:
            self._wire.disconnect(SCHEDULER)
        elif self._name != SCHEDULER:
            self._wire.connect(SCHEDULER, self.latest.scheduler)
