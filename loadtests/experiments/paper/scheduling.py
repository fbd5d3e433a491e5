"""Figure 16: the cost of decisions with many instances, as wall time on synthetic loads."""

import random
import statistics
import time
from collections.abc import Callable, Sequence

import rich.console

from loadtests.experiments.figure import Figure, FigureOptions, FigurePoint, Metric
from loadtests.experiments.result_store import Results
from loadtests.no_actions import NoActions
from router.dispatcher import Dispatcher
from router.load import InstanceLoad
from router.policies import PolicySet, policy_set
from router.request import NewRequest
from router.scaling import PoolBounds
from router.scheduler import Scheduler

SIZES = (64, 128, 256, 512, 1024)
POLICIES = {"infaas++": "INFaaS++", "llumnix-paper": "Llumnix", "llumnix": "our defaults"}
DISPATCH = Metric("Dispatch decision", unit="ms", log=True)
ROUND = Metric("Scheduling round", unit="ms", log=True)
PANEL = "this machine"
REPEATS = 30

#: Decisions timed together, without load reports between them.
DISPATCHES_PER_ROUND = 20


def synthetic_loads(count: int, rng: random.Random) -> list[InstanceLoad]:
    """A busy cluster: most instances have room, some are nearly full with requests queued."""
    loads = []
    for number in range(count):
        full = rng.random() < 0.2
        free = rng.randrange(0, 20) if full else rng.randrange(50, 600)
        head = rng.randrange(20, 200) if full else 0
        loads.append(
            InstanceLoad(
                instance_id=f"neutral-{number}",
                role="neutral",
                total_blocks=780,
                free_blocks=free,
                running=rng.randrange(10, 60),
                waiting=int(full) * rng.randrange(1, 5),
                waiting_tokens=16 * head,
                head_of_line_blocks=head,
                waiting_blocks=head,
                watermark_blocks=8,
                preempted=int(full and rng.random() < 0.3),
            )
        )
    return loads


def _median_ms(action: Callable[[], object], prepare: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        prepare()
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def dispatch_ms(count: int, policies: PolicySet, repeats: int = REPEATS) -> float:
    """Time of one dispatch decision, in a stream of decisions with load reports in between."""
    rng = random.Random(count)
    dispatcher = Dispatcher(policies, rng=random.Random(0))
    for load in synthetic_loads(count, rng):
        dispatcher.loads.report(load)
    request = NewRequest(128)

    def decide() -> None:
        for _ in range(DISPATCHES_PER_ROUND):
            dispatcher.dispatch(request)

    def report() -> None:
        for load in synthetic_loads(count, rng):
            dispatcher.loads.report(load)

    return _median_ms(decide, report, repeats) / DISPATCHES_PER_ROUND


def round_ms(count: int, policies: PolicySet, repeats: int = REPEATS) -> float:
    """Time of one scheduling round after a load report of every instance: migrations, and the pool's size."""
    rng = random.Random(count)
    bounds = {"neutral": PoolBounds(1, 2 * count)}
    schedulers: list[Scheduler] = []

    def report() -> None:
        schedulers[:] = [Scheduler(policies, NoActions(), autoscale=bounds, clock=lambda: 0.0)]
        for load in synthetic_loads(count, rng):
            schedulers[0].report(load)

    return _median_ms(lambda: schedulers[0].decide(0.0), report, repeats)


def _points(options: FigureOptions, results: Results, console: rich.console.Console) -> list[FigurePoint]:
    points = []
    for name, series in POLICIES.items():
        policies = policy_set(name)
        for count in options.pick(SIZES):
            with console.status(f"decisions of {name} on {count} instances"):
                points.append(FigurePoint(PANEL, series, DISPATCH.name, count, dispatch_ms(count, policies)))
                points.append(FigurePoint(PANEL, series, ROUND.name, count, round_ms(count, policies)))
    return points


def _findings(points: Sequence[FigurePoint]) -> list[str]:
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


FIGURE = Figure(
    16,
    "scheduling",
    "Scheduler: wall time of its decisions on synthetic loads, one core",
    "instances",
    (DISPATCH, ROUND),
    points=_points,
    findings=_findings,
    log_x=True,
)
