"""What an instance keeps for API servers, over real sockets, ends with them."""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest_asyncio
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from migration.engine_interface import Engine
from migration.messages import InstanceId, RequestId
from migration.transport.local import LocalFabric
from pd_serve.api.codec import VllmCodec
from pd_serve.comm.membership import MANAGER, ApiServerInfo, Membership
from pd_serve.comm.messages import AddRequest, Heartbeat, ToApiServer, ToManager
from pd_serve.comm.timing import REQUEST_REPORT_INTERVAL_S
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.instance.engine_factory import create_engine
from pd_serve.instance.llumlet import Llumlet
from pd_serve.instance.token_publisher import TokenPublisher
from pd_serve.simulated_engine.cost_model import COST_MODELS
from pd_serve.simulated_engine.settings import EngineSettings

HOST = "127.0.0.1"
KEYS = CurveKeys.generate()
NUM_API_SERVERS = 30


def payload(request_id: str) -> list[bytes]:
    return VllmCodec().encode_request(
        EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=list(range(50)),
            mm_features=None,
            sampling_params=SamplingParams(max_tokens=10_000),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
    )


def descriptors() -> Counter[str]:
    """Number of open descriptors by kind: a path, or "socket", "pipe", "anon_inode"."""
    kinds: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            kinds[os.readlink(f"/proc/self/fd/{number}").split(":")[0]] += 1
    return kinds


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest_asyncio.fixture
async def instance() -> AsyncIterator[tuple[Llumlet, Engine]]:
    """Its llumlet and its engine, which is simulated."""
    wire = Wire("neutral-0", HOST, KEYS)
    transport, tokens = LocalFabric().transport("neutral-0"), TokenPublisher("neutral-0", wire)
    llumlet = Llumlet(InstanceId("neutral-0"), "neutral", wire, tokens)
    settings = EngineSettings(COST_MODELS["a10-llama-7b"], num_blocks=2000)
    engine = create_engine({}, settings, tokens.publish, llumlet.events)
    transport.register(engine.regions)
    llumlet.start(engine, transport)
    yield llumlet, engine
    await engine.stop()
    await llumlet.close()
    tokens.close()
    await wire.close()


@pytest_asyncio.fixture
async def manager() -> AsyncIterator[Wire]:
    wire = Wire(MANAGER, HOST, KEYS)
    yield wire
    await wire.close()


async def test_descriptors_and_memory_are_flat_while_thirty_api_servers_die(
    instance: tuple[Llumlet, Engine], manager: Wire
) -> None:
    """Each dies with streams under way, and does not read any more until the manager has noticed."""
    llumlet, engine = instance
    manager_address = manager.listen(ToManager, lambda sender, message, payload: None)
    manager.connect("neutral-0", llumlet.address)

    async def live_and_die(number: int) -> None:
        name = f"api-{number}"
        arrived = asyncio.Event()
        api_server = Wire(name, HOST, KEYS)
        address = api_server.listen(ToApiServer, lambda sender, message, payload: None)
        client = api_server.listen_for_frames(lambda frames: arrived.set())
        joined = {name: ApiServerInfo(address, client)}
        manager.send("neutral-0", Membership(1, manager_address, api_servers=joined))
        api_server.connect("neutral-0", llumlet.address)
        api_server.send("neutral-0", Heartbeat(number=1))
        for request in range(4):
            request_id = f"{name}-{request}"
            message = AddRequest(RequestId(request_id), client, 0, None, [])
            api_server.send("neutral-0", message, payload(request_id))
        async with asyncio.timeout(30):
            await arrived.wait()
        await api_server.close()
        await asyncio.sleep(0.1)
        manager.send("neutral-0", Membership(1, manager_address))
        async with asyncio.timeout(30):
            while await engine.live_requests():  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    await live_and_die(0)
    await asyncio.sleep(2 * REQUEST_REPORT_INTERVAL_S)
    open_before, memory_before = descriptors(), resident_mib()

    for number in range(1, NUM_API_SERVERS + 1):
        await live_and_die(number)

    # What stays of each would be one descriptor at least. Other tests of this process may have opened some.
    most = open_before.total() + NUM_API_SERVERS // 2
    for _ in range(600):  # libzmq closes sockets in a thread of its own
        if (open_now := descriptors()).total() <= most:
            break
        await asyncio.sleep(0.1)
    assert open_now.total() <= most, open_now - open_before
    assert resident_mib() < memory_before + 40
