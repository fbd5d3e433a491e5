"""A small cluster in one process: real sockets, and simulated engines in real time."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest

from migration.messages import InstanceId
from migration.record import MigrationRecord
from migration.transport.local import LocalFabric
from pd_serve.api.codec import VllmCodec
from pd_serve.api.prefix_keys import PrefixKeys
from pd_serve.comm.membership import MANAGER, ApiServerInfo, InstanceInfo, Join, Membership
from pd_serve.comm.message_wire import OnFrames
from pd_serve.comm.messages import ToManager
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.frontend.frontend import Frontend
from pd_serve.instance.engine_factory import create_engine
from pd_serve.instance.llumlet import Llumlet
from pd_serve.instance.token_publisher import TokenPublisher
from pd_serve.observe.recorder import Observer, RequestRecorder
from pd_serve.simulated_engine.cost_model import COST_MODELS
from pd_serve.simulated_engine.settings import EngineSettings
from router.dispatcher import Dispatcher
from router.policies import policy_set
from router.request import NewRequest

HOST = "127.0.0.1"
KEYS = CurveKeys.generate()
SETTINGS = EngineSettings(COST_MODELS["a10-llama-7b"], num_blocks=2000)


class Proxy:
    """Forwards TCP connections, and can stall and reset them.

    Attributes:
        target: Address that it forwards to.
    """

    def __init__(self) -> None:
        self.target = ""
        self.address = ""
        self.num_resets = 0
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, HOST, 0)
        self.address = f"tcp://{HOST}:{self._server.sockets[0].getsockname()[1]}"

    def stall(self) -> None:
        self._flows.clear()

    def reset(self) -> None:
        """Resets all connections: everything that is in them is lost. New ones work."""
        self.num_resets += len(self._writers)
        for writer in self._writers:
            writer.transport.abort()
        self._flows.set()

    async def close(self) -> None:
        self._server.close()
        self.reset()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = urlsplit(self.target)
        try:
            upstream = await asyncio.open_connection(target.hostname, target.port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, upstream[1]}
        forward = [self._forward(reader, upstream[1]), self._forward(upstream[0], writer)]
        await asyncio.gather(*forward)
        self._writers -= {writer, upstream[1]}

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


class ProxiedWire(Wire):
    """A wire whose peers see the addresses of proxies."""

    def __init__(self, name: str, proxies: list[Proxy]) -> None:
        super().__init__(name, HOST, KEYS)
        self._proxies = iter(proxies)

    def _bind(self, on_frames: OnFrames, pause_s: float = 0.0) -> str:
        proxy = next(self._proxies)
        proxy.target = super()._bind(on_frames, pause_s)
        return proxy.address


class ObservedEvents(Observer):
    """What happens to requests.

    Attributes:
        kinds: Numbers of reconciliations, by kind.
        migrations: Those that have ended.
    """

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.migrations: list[MigrationRecord] = []

    def reconciled(self, kind: str, number: int) -> None:
        self.kinds[kind] += number

    def migration_ended(self, record: MigrationRecord) -> None:
        self.migrations.append(record)


class Cluster:
    """An API server, two prefill and two decode instances, and proxies in front of all their sockets.

    Args:
        changes: Settings of the policies.
    """

    def __init__(self, settings: EngineSettings = SETTINGS, **changes: object) -> None:
        self.settings = settings
        self.keys = PrefixKeys()
        self._policies = policy_set("llumnix", **changes)
        self.proxies: list[Proxy] = []
        self.observer = ObservedEvents()
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}
        self.all_ended = asyncio.Event()
        self.llumlets: dict[str, Llumlet] = {}
        self._close: list[Callable[[], Awaitable[None]]] = []
        self._fabric = LocalFabric()
        self._manager = Wire(MANAGER, HOST, KEYS)
        self._manager_address = self._manager.listen(ToManager, self._on_message)
        self._api_servers: dict[str, ApiServerInfo] = {}
        self._instances: list[InstanceInfo] = []

    async def start(self) -> None:
        """Returns when the API server knows all instances."""
        for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
            await self._start_instance(name)
        wire = await self._proxied_wire("api")

        async def find_manager() -> str:
            return self._manager_address

        self.frontend = Frontend(
            wire,
            find_manager,
            VllmCodec(),
            self._deliver,
            Dispatcher(self._policies),
            num_slots=8,
            recorder=RequestRecorder((self.observer,)),
        )
        self._telling = asyncio.create_task(self._tell_members())
        async with asyncio.timeout(30):
            await self.frontend.wait_for_instances()

    async def stop(self) -> None:
        self._telling.cancel()
        await self.frontend.close()
        for close in self._close:
            await close()
        await self._manager.close()
        for proxy in self.proxies:
            await proxy.close()

    async def disturb(self, dice: random.Random) -> None:
        """Stalls and resets one proxy after another."""
        while True:
            proxy = dice.choice([proxy for proxy in self.proxies if proxy.target])
            await asyncio.sleep(dice.random() / 5)
            proxy.stall()
            await asyncio.sleep(dice.random() / 5)
            proxy.reset()

    async def _start_instance(self, name: str) -> None:
        wire = await self._proxied_wire(name)
        transport, tokens = self._fabric.transport(name), TokenPublisher(name, wire)
        llumlet = Llumlet(InstanceId(name), name.rpartition("-")[0], wire, tokens)
        engine = create_engine({}, self.settings, tokens.publish, llumlet.events)
        transport.register(engine.regions)
        llumlet.start(engine, transport)
        self.llumlets[name] = llumlet
        self._manager.connect(name, llumlet.address)
        role = name.rpartition("-")[0]
        self._instances.append(InstanceInfo(name, role, llumlet.address, "node", 1, engine.facts))

        async def close() -> None:
            await engine.stop()
            await llumlet.close()
            tokens.close()
            await wire.close()

        self._close.append(close)

    async def _proxied_wire(self, name: str) -> ProxiedWire:
        proxies = [Proxy(), Proxy()]
        for proxy in proxies:
            await proxy.start()
        self.proxies += proxies
        return ProxiedWire(name, proxies)

    def _on_message(self, sender: str, message: Any, payload: Sequence[bytes]) -> None:
        if isinstance(message, Join):
            self._manager.connect(sender, message.info.address)
            self._api_servers = {sender: message.info}

    async def _tell_members(self) -> None:
        while True:
            membership = Membership(1, self._manager_address, self._instances, api_servers=self._api_servers)
            for peer in (*self._api_servers, *(info.instance_id for info in self._instances)):
                self._manager.send(peer, membership)
            await asyncio.sleep(0.5)

    def submit(self, request_id: str, prompt: list[int], max_tokens: int) -> None:
        request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=SamplingParams(max_tokens=max_tokens),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self.tokens[request_id] = []
        payload = VllmCodec().encode_request(request)
        keys = self.keys.of(request, self.frontend.instances.cached_blocks.format)
        new = NewRequest(len(prompt), prefix_keys=keys)
        self.frontend.requests.submit(request_id, payload, new, max_tokens=max_tokens)

    def _deliver(self, batch: Any) -> None:
        assert isinstance(batch, EngineCoreOutputs)
        for output in batch.outputs:
            self.tokens[output.request_id] += output.new_token_ids
            if output.finish_reason is not None:
                self.ends[output.request_id] = str(output.finish_reason)
        if len(self.ends) == len(self.tokens):
            self.all_ended.set()
