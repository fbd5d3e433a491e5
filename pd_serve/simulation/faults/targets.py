"""Which process a fault means, when it happens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from migration.messages import RequestId
from pd_serve.simulation.faults.clients import Clients
from pd_serve.simulation.faults.cluster import FaultyCluster, SimulatedApiServer
from pd_serve.simulation.faults.process_loop import SimulatedProcess

#: Time until the platform has started another API server, in seconds.
API_SERVER_START_S = 3.0


@dataclass(frozen=True)
class FaultTarget:
    """A process: its name on the network, and how it is killed."""

    name: str
    process: SimulatedProcess
    kill: Callable[[], None]


class TargetFinder:
    """Finds the process that a selector names; see `ScheduledFault.target`."""

    def __init__(self, cluster: FaultyCluster, clients: Clients) -> None:
        self._cluster = cluster
        self._clients = clients

    def find(self, selector: str, names: dict[str, str]) -> FaultTarget | None:
        """The process that a selector names now; None if there is none.

        Args:
            names: "sender" and "receiver" of the message that the fault has waited for, and the number of its
                "request".
        """
        kind, _, index = selector.partition(":")
        if kind == "server":
            stream = self._clients.stream_of(int(names["request"])) if names.get("request") else None
            return self.named(stream.api_server.name) if stream else None
        if kind in names:
            return self.named(names[kind])
        if kind in ("manager", "scheduler"):
            return self.named(kind)
        if kind == "api":
            servers = self._cluster.api_servers
            return self.named(servers[int(index) % len(servers)].name) if servers else None
        if kind == "owner":
            stream = self._clients.stream_of(int(index) % len(self._clients.requests))
            request = stream and stream.api_server.frontend.requests.requests.get(
                RequestId(stream.request_id)
            )
            return self.named(request.ledger.owner) if request else None
        found = sorted(
            name
            for name, instance in self._cluster.platform.instances.items()
            if kind == "instance" or instance.llumlet.reporter.role == kind
        )
        return self.named(found[int(index) % len(found)]) if found else None

    def named(self, name: str) -> FaultTarget | None:
        """The living process of a name."""
        cluster = self._cluster
        if (actor := cluster.platform.actors.get(name)) is not None:
            return FaultTarget(name, actor.process, lambda: cluster.platform.kill_instance(name))
        if name == "scheduler" and cluster.platform.scheduler is not None:
            return FaultTarget(name, cluster.platform.scheduler[0], cluster.platform.kill_scheduler)
        if name == "manager" and (handle := cluster.manager) is not None:
            return FaultTarget(name, handle.process, lambda: cluster.kill_manager(handle))
        for api_server in cluster.api_servers:
            if api_server.name == name:
                return FaultTarget(name, api_server.process, partial(self._kill_api_server, api_server))
        return None

    def all_names(self) -> list[str]:
        """Names of all living processes on the network."""
        cluster = self._cluster
        servers = [api_server.name for api_server in cluster.api_servers]
        return ["manager", "scheduler", *servers, *sorted(cluster.platform.actors)]

    def _kill_api_server(self, api_server: SimulatedApiServer) -> None:
        if api_server not in self._cluster.api_servers:
            return
        self._cluster.kill_api_server(api_server)
        self._clients.api_server_died(api_server)
        loop = self._cluster.loop
        loop.outside_at(loop.now + API_SERVER_START_S, self._cluster.start_api_server)
