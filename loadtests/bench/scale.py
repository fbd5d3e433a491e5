"""`bench scale`: decisions and load reports of many instances, in the processes that decide.

The scheduler's rounds and the dispatches of an API server are timed alone, on made loads of busy instances.
Load reports come over real sockets, one for each instance, from another process: measured is the CPU time of
all threads of the process that receives them, less what it takes without reports.
"""

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast

from loadtests.bench.report import BenchmarkReport
from loadtests.bench.report_senders import CONNECT_S, ReportSenders
from loadtests.no_actions import NoActions
from loadtests.terminal import numbers_table
from migration.engine_interface import EngineFacts
from pd_serve.comm.membership import MANAGER, SCHEDULER, InstanceInfo, Membership
from pd_serve.comm.message_wire import OnMessage
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.frontend.frontend import Frontend
from pd_serve.frontend.output_codec import OutputCodec
from pd_serve.instance.load_reporter import report_interval_s
from pd_serve.scheduler.scheduler_process import SchedulerProcess
from router.dispatcher import Dispatcher
from router.load import InstanceLoad
from router.policies import policy_set
from router.request import NewRequest
from router.scaling import PoolBounds
from router.scheduler import Scheduler

SIZES = (64, 256, 1024)

#: Targets at the largest size.
MAX_ROUND_MS, MAX_DISPATCH_MS, MAX_REPORTS_SHARE = 20.0, 0.3, 0.1

ROUNDS = 50
DISPATCHES = 500
SECONDS = 5.0
SETTLE_S = 2.0
HOST = "127.0.0.1"
TOTAL_BLOCKS = 851
PROMPT_TOKENS = 500


async def run(report: BenchmarkReport) -> None:
    """Measures, shows a table and writes the numbers. Takes about a minute."""
    table = numbers_table(
        "many instances", "instances", "round ms", "dispatch ms", "hand-off ms", "scheduler", "API server"
    )
    rows = []
    for number in SIZES:
        with report.console.status(f"{number} instances"):
            rows.append(row := await _measure(number))
        table.add_row(
            str(number),
            f"{row['round_ms']:.2f}",
            f"{row['dispatch_ms']:.3f}",
            f"{row['handoff_ms']:.3f}",
            f"{row['scheduler_share']:.2%}",
            f"{row['api_server_share']:.2%}",
        )
    table.caption = (
        f"medians; shares of a core for load reports; targets with {SIZES[-1]}: at most {MAX_ROUND_MS:g} ms, "
        f"{MAX_DISPATCH_MS:g} ms for a dispatch with its hand-off, {MAX_REPORTS_SHARE:.0%}"
    )
    report.show(table)
    report.write({"rows": rows})


def busy_loads(number: int, dice: random.Random) -> list[InstanceLoad]:
    """Loads of instances that all have requests; a quarter of them are prefill instances."""
    return [_load(name, role, dice) for name, role in _names(number)]


def _names(number: int) -> list[tuple[str, str]]:
    roles = ["prefill" if place < number // 4 else "decode" for place in range(number)]
    return [(f"{role}-{place}", role) for place, role in enumerate(roles)]


def _load(name: str, role: str, dice: random.Random) -> InstanceLoad:
    is_prefill = role == "prefill"
    return InstanceLoad(
        instance_id=name,
        role=role,
        total_blocks=TOTAL_BLOCKS,
        free_blocks=dice.randint(50, TOTAL_BLOCKS - 50),
        watermark_blocks=8,
        running=dice.randint(1, 4 if is_prefill else 60),
        waiting=dice.randint(0, 4) if is_prefill else 0,
        waiting_tokens=dice.randint(0, 4000) if is_prefill else 0,
        high_priority=int(dice.random() < 0.1),
        decode_step_s=0.025,
        prompt_token_s=0.0001,
        token_s=0.025,
        least_step_s=0.02,
        busy=dice.random(),
        requests_added=dice.randint(0, 10_000),
    )


async def _measure(number: int) -> dict[str, float]:
    dice = random.Random(0)
    dispatch_ms, handoff_ms = _dispatches(number, dice)
    return {
        "instances": number,
        "round_ms": round(_scheduler_round_ms(number, dice), 3),
        "dispatch_ms": round(dispatch_ms, 4),
        "handoff_ms": round(handoff_ms, 4),
        "report_interval_s": report_interval_s(number),
        "scheduler_share": round(await _share_of_reports(number, _scheduler), 4),
        "api_server_share": round(await _share_of_reports(number, _api_server), 4),
    }


def _scheduler_round_ms(number: int, dice: random.Random) -> float:
    """Median CPU time of a round after new reports of all instances, with scaling and changes of roles."""
    bounds = {role: PoolBounds(1, 2 * number) for role in ("prefill", "decode")}
    policies = policy_set("llumnix", roles=True)
    scheduler = Scheduler(policies, NoActions(), autoscale=bounds, rng=dice, clock=time.monotonic)
    taken = []
    for _ in range(ROUNDS):
        for load in busy_loads(number, dice):
            scheduler.report(load)
        began = time.thread_time()
        scheduler.decide(time.monotonic())
        taken.append(time.thread_time() - began)
    return 1e3 * statistics.median(taken)


def _dispatches(number: int, dice: random.Random) -> tuple[float, float]:
    """Median CPU times of a dispatch, and of the choice of its destinations, between reports of others."""
    dispatcher = Dispatcher(policy_set("llumnix"), rng=dice)
    names = _names(number)
    for load in busy_loads(number, dice):
        dispatcher.loads.report(load)
    dispatches, handoffs = [], []
    for count in range(DISPATCHES):
        for name, role in dice.sample(names, 4):
            dispatcher.loads.report(_load(name, role, dice))
        began = time.thread_time()
        chosen = dispatcher.dispatch(NewRequest(PROMPT_TOKENS))
        dispatched = time.thread_time()
        destinations = dispatcher.destinations(num_blocks=32)
        ended = time.thread_time()
        assert chosen is not None
        dispatcher.loads.expect(destinations[0], str(count), 32)
        dispatcher.loads.settled(destinations[0], str(count - 100))
        dispatches.append(dispatched - began)
        handoffs.append(ended - dispatched)
    return 1e3 * statistics.median(dispatches), 1e3 * statistics.median(handoffs)


# ---- reports


class _Listener(Wire):
    """A wire that keeps its latest address."""

    address = ""

    def listen(self, kind: Any, on_message: OnMessage, *, gathers: bool = False) -> str:
        self.address = super().listen(kind, on_message, gathers=gathers)
        return self.address


@asynccontextmanager
async def _scheduler(keys: CurveKeys, manager: str, number: int) -> AsyncIterator[str]:
    """A scheduler that never decides; yields the address for reports."""
    wire = _Listener(SCHEDULER, HOST, keys)
    process = SchedulerProcess(wire, policy_set("llumnix", rescheduling_interval_s=3600.0))
    yield wire.address
    await process.close()
    await wire.close()


@asynccontextmanager
async def _api_server(keys: CurveKeys, manager: str, number: int) -> AsyncIterator[str]:
    """The request router of an API server without requests; yields the address for reports."""

    async def find_manager() -> str:
        return manager

    wire = _Listener("api", HOST, keys)
    dispatcher = Dispatcher(policy_set("llumnix"))
    codec = cast(OutputCodec, None)
    frontend = Frontend(wire, find_manager, codec, lambda batch: None, dispatcher, num_slots=number)
    yield wire.address
    await frontend.close()


async def _share_of_reports(
    number: int, receiver: Callable[[CurveKeys, str, int], AbstractAsyncContextManager[str]]
) -> float:
    """Share of a core that a process takes for the reports of its instances."""
    keys, dice = CurveKeys.generate(), random.Random(0)
    facts = EngineFacts(None, TOTAL_BLOCKS * 16, TOTAL_BLOCKS, 16, ("generate",))
    manager = Wire(MANAGER, HOST, keys)
    async with (
        ReportSenders(keys, busy_loads(number, dice), report_interval_s(number)) as senders,
        receiver(keys, senders.address, number) as address,
    ):
        infos = [InstanceInfo(name, role, senders.address, "node", 1, facts) for name, role in _names(number)]
        manager.connect("receiver", address)
        manager.send("receiver", Membership(1, senders.address, infos))
        await asyncio.sleep(SETTLE_S + number * CONNECT_S)
        idle = await _cpu_share()
        await senders.begin(address)
        busy = await _cpu_share()
        await senders.end()
    await manager.close()
    return busy - idle


async def _cpu_share() -> float:
    began, used = time.monotonic(), time.process_time()
    await asyncio.sleep(SECONDS)
    return (time.process_time() - used) / (time.monotonic() - began)
