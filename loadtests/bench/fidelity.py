"""How close the simulated cluster is to a service: rounds of the same requests on both, compared."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from loadtests.bench import simulated_side
from loadtests.bench.load import Load
from loadtests.bench.rounds import Round
from loadtests.bench.simulated_side import FrontEnd
from loadtests.latency_statistics import statistics_ms
from loadtests.outcome import Outcome, latencies_s
from loadtests.terminal import numbers_table
from pd_serve.simulated_engine.cost_model import LinearCostModel
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulation.config import NetworkSettings, TraceRequest

#: Targets: how far a ratio may be from 1.
MAX_ERROR = {"p50": 0.1, "p99": 0.2}

#: Names in reports of the latencies of `loadtests.outcome`, with their titles.
REPORTED = {"request": ("e2e", "request"), "ttft": ("ttft", "TTFT"), "itl": ("itl", "ITL")}
PARTS = ("mean", "p50", "p99")

Summary = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class RealRound:
    """A round on the service, and what is known of the service then. Its number in a list is its seed.

    Attributes:
        alone_load, alone: Requests one after the other, before the round.
        model: Durations of the engines' steps.
    """

    load: Load
    measured: Round
    alone_load: Load
    alone: list[Outcome]
    model: LinearCostModel


async def compared(
    layout: dict[str, int],
    rounds: Sequence[RealRound],
    engines: Callable[[LinearCostModel], Mapping[str, EngineSettings]],
    network: NetworkSettings,
) -> dict[str, Any]:
    """Simulates each round with its front end and its steps; the numbers of both sides.

    Args:
        engines: Settings by role of engines with these steps.

    Raises:
        PdServeError: A simulation is wrong.
    """

    async def simulate(
        one: RealRound, seed: int, requests: list[TraceRequest], front_end: FrontEnd
    ) -> list[Outcome]:
        by_role = engines(front_end.around(one.model))
        wanted = simulated_side.config(requests, layout, by_role, network, seed, front_end.request_s)
        return await asyncio.to_thread(simulated_side.simulate, wanted)

    simulated: list[Outcome] = []
    front_ends = []
    for seed, one in enumerate(rounds):
        alone = simulated_side.alone(one.alone_load.requests(seed))
        front_end = FrontEnd.measured(one.alone, await simulate(one, seed, alone, FrontEnd()))
        simulated += await simulate(one, seed, one.load.requests(seed), front_end)
        front_ends.append({name: round(1e3 * value, 3) for name, value in asdict(front_end).items()})
    measured = [one.measured for one in rounds]
    real_ms, simulated_ms = summary([o for one in measured for o in one.outcomes]), summary(simulated)
    return {
        "instances": layout,
        "rate": rounds[0].load.rate,
        "real_ms": real_ms,
        "simulated_ms": simulated_ms,
        "ratio": ratios(real_ms, simulated_ms),
        "front_end_ms": front_ends,
        "rounds_real_ms": [summary(one.outcomes) for one in measured],
        "load_averages": [one.load_average for one in measured],
        "cores_used": [round(one.cpu_s / one.seconds, 2) for one in measured],
        "tokens_per_message": [_tokens_per_message(one.outcomes) for one in measured],
    }


def _tokens_per_message(outcomes: Sequence[Outcome]) -> float:
    """Above 1 where tokens arrived together because the server or the client was late."""
    return round(sum(one.tokens - 1 for one in outcomes) / sum(len(one.gaps_s) for one in outcomes), 3)


def summary(outcomes: Sequence[Outcome]) -> Summary:
    """{"request", "ttft", "itl"} of {"mean", "p50", "p99"} in milliseconds."""
    times = latencies_s(outcomes)
    return {
        name: {part: value or 0.0 for part, value in statistics_ms(times[latency], PARTS).items()}
        for name, (latency, _) in REPORTED.items()
    }


def ratios(real: Summary, simulated: Summary) -> Summary:
    """Real ÷ simulated of two summaries."""
    return {
        name: {part: round(real[name][part] / simulated[name][part], 3) for part in PARTS}
        for name in REPORTED
    }


def missed(ratio: Summary) -> list[str]:
    """The latencies that are further from those of the service than the target."""
    return [
        f"{name} {part}"
        for name in REPORTED
        for part, error in MAX_ERROR.items()
        if not 1 - error <= ratio[name][part] <= 1 + error
    ]


def fidelity_table(result: Mapping[str, Any], engines: str) -> Table:
    """The numbers of `compared`.

    Args:
        engines: What the service computes with, for the title.
    """
    layout = ", ".join(f"{number} {role}" for role, number in result["instances"].items())
    table = numbers_table(f"{layout}, {engines}", "ms", "", "real", "simulated", "ratio", labels=2)
    for name, (_, label) in REPORTED.items():
        for part in PARTS:
            real, simulated = (f"{result[side][name][part]:.1f}" for side in ("real_ms", "simulated_ms"))
            table.add_row(label, part, real, simulated, f"{result['ratio'][name][part]:.2f}")
        table.add_section()
    table.caption = "\n".join(
        [
            f"{result['rate']} requests/s; front end, ms: {result['front_end_ms']}",
            f"missed (p50 within 10 %, p99 within 20 %): {', '.join(missed(result['ratio'])) or 'nothing'}",
        ]
    )
    return table
