"""Figure 16: what decisions cost with many instances. Wall time of the real scheduler on loads made up."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import rich.console

from loadtests.experiments.paper.figure import Figure, Metric, Options, Point
from loadtests.experiments.runs import Results
from pd_serve.simulation.scenario import Scenario
from router.dispatcher import Dispatcher
from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.policies import PolicySet, policy_set
from router.request import NO_DEMAND, Demand, NewRequest
from router.scaling import PoolBounds
from router.scheduler import Scheduler

SIZES = (64, 128, 256, 512, 1024)
POLICIES = {"infaas++": "INFaaS++", "llumnix-paper": "Llumnix", "llumnix": "our defaults"}
DISPATCH = Metric("Dispatch decision", unit="ms", log=True)
ROUND = Metric("Scheduling round", unit="ms", log=True)
PANEL = "this machine"
REPEATS = 30

#: Decisions timed together, between which nobody reports.
DISPATCHES_PER_ROUND = 20


def synthetic_loads(count: int, dice: random.Random) -> list[InstanceLoad]:
    """A busy cluster: most instances have room, some are nearly full with requests queued."""
    loads = []
    for number in range(count):
        full = dice.random() < 0.2
        free = dice.randrange(0, 20) if full else dice.randrange(50, 600)
        head = dice.randrange(20, 200) if full else 0
        loads.append(
            InstanceLoad(
                instance_id=f"neutral-{number}",
                role="neutral",
                total_blocks=780,
                free_blocks=free,
                running=dice.randrange(10, 60),
                waiting=int(full) * dice.randrange(1, 5),
                waiting_tokens=16 * head,
                head_of_line_blocks=head,
                waiting_blocks=head,
                watermark_blocks=8,
                preempted=int(full and dice.random() < 0.3),
            )
        )
    return loads


class NoActions:
    """Takes what the scheduler decides, and does none of it."""

    starting: Mapping[str, int] = MappingProxyType({})
    waiting: Demand = NO_DEMAND

    def move(self, source: str, destination: InstanceLoad, reason: str, selection: PolicyChoice) -> None: ...
    def set_role(self, instance_id: str, role: str, reason: str) -> None: ...
    def set_draining(self, instance_id: str, draining: bool, reason: str) -> None: ...
    def start(self, role: str, reason: str) -> None: ...
    def stop(self, instance_id: str, reason: str) -> None: ...


def _median_ms(action: Callable[[], object], prepare: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        prepare()
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def dispatch_ms(count: int, policies: PolicySet, repeats: int = REPEATS) -> float:
    """One decision on where a request starts, in a stream of them with reports in between."""
    dice = random.Random(count)
    dispatcher = Dispatcher(policies, rng=random.Random(0))
    for load in synthetic_loads(count, dice):
        dispatcher.loads.report(load)
    request = NewRequest(128)

    def some() -> None:
        for _ in range(DISPATCHES_PER_ROUND):
            dispatcher.dispatch(request)

    def report() -> None:
        for load in synthetic_loads(count, dice):
            dispatcher.loads.report(load)

    return _median_ms(some, report, repeats) / DISPATCHES_PER_ROUND


def round_ms(count: int, policies: PolicySet, repeats: int = REPEATS) -> float:
    """One round over all instances after each has reported: who moves what to whom, and the pool's size."""
    dice = random.Random(count)
    bounds = {"neutral": PoolBounds(1, 2 * count)}
    schedulers: list[Scheduler] = []

    def report() -> None:
        schedulers[:] = [Scheduler(policies, NoActions(), autoscale=bounds, clock=lambda: 0.0)]
        for load in synthetic_loads(count, dice):
            schedulers[0].report(load)

    return _median_ms(lambda: schedulers[0].decide(0.0), report, repeats)


def _points(options: Options, results: Results, console: rich.console.Console) -> list[Point]:
    points = []
    for name, series in POLICIES.items():
        policies = policy_set(name)
        for count in options.pick(SIZES):
            with console.status(f"decisions of {name} on {count} instances"):
                points.append(Point(PANEL, series, DISPATCH.name, count, dispatch_ms(count, policies)))
                points.append(Point(PANEL, series, ROUND.name, count, round_ms(count, policies)))
    return points


def _findings(points: Sequence[Point]) -> list[str]:
    lines = []
    for series in POLICIES.values():
        for metric in (DISPATCH, ROUND):
            curve = {p.x: p.ours for p in points if (p.series, p.metric) == (series, metric.name)}
            least, most = min(curve), max(curve)
            lines.append(
                f"{metric.name}, {series}: {curve[least]:.3f} ms with {least:g} instances, "
                f"{curve[most]:.3f} ms with {most:g}"
            )
    return lines


def _cases(options: Options) -> list[Scenario]:
    return []


FIGURE = Figure(
    16,
    "scheduling",
    "Scheduler: wall time of its decisions on synthetic loads, one core",
    "instances",
    (DISPATCH, ROUND),
    _cases,
    _points,
    _findings,
    log_x=True,
)
