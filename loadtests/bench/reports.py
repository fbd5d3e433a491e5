"""`bench reports`: the cost of the reports of requests on an instance's step thread.

One engine in this process decodes a full batch. Meanwhile reports of all its requests are made between its
steps, encoded and sent over a socket, as an instance does: far more often than in service, so that there are
enough of them. Steps and reports are measured in the same run, and the result is their ratio at the interval
of the service.
"""

import asyncio
import random
import statistics
from collections.abc import Sequence

from loadtests.bench.report import BenchmarkReport
from loadtests.terminal import numbers_table
from migration.engine_interface import HeldRequest
from pd_serve.comm.messages import RequestReport
from pd_serve.comm.timing import REQUEST_REPORT_INTERVAL_S
from pd_serve.comm.wire import CurveKeys, Wire
from pd_serve.profiling.engine_profile import start_engine
from pd_serve.profiling.measured_engine import MeasuredEngine
from pd_serve.profiling.profile_points import Point

#: Target: share of the step thread's time.
MAX_SHARE = 0.01

BATCH_SIZE = 256
PROMPT_TOKENS = 16
ROUNDS = 2
PAUSE_S = 0.02
HOST = "127.0.0.1"
FLAGS = ("--max-num-seqs", str(BATCH_SIZE), "--max-num-batched-tokens", str(BATCH_SIZE * PROMPT_TOKENS))


async def run(report: BenchmarkReport) -> None:
    """Measures, shows a table and writes the numbers. Takes a minute or two.

    Raises:
        PdServeError: The engine did not start, or failed.
    """
    with report.console.status("starting an engine"):
        engine = await start_engine("tiny", FLAGS)
    keys = CurveKeys.generate()
    wire, api_server = Wire("instance", HOST, keys), Wire("api", HOST, keys)
    try:
        steps_ms, reports_ms = await _measure(engine, wire, api_server)
    finally:
        await wire.close()
        await api_server.close()
        await engine.close()
    result = summary(steps_ms, reports_ms)
    table = numbers_table(
        "reports of requests", "running", "step ms", "report ms", "share of the step thread"
    )
    share = f"{result['share']:.3%}"
    table.add_row(
        str(BATCH_SIZE),
        f"{result['step_ms']:.2f}",
        f"{result['report_ms']:.3f}",
        f"[{'green' if result['share'] <= MAX_SHARE else 'red'}]{share}[/]",
    )
    table.caption = f"medians; a report every {REQUEST_REPORT_INTERVAL_S} s; target: at most {MAX_SHARE:.0%}"
    report.show(table)
    report.write({"running": BATCH_SIZE} | result)


def summary(steps_ms: Sequence[float], reports_ms: Sequence[float]) -> dict[str, float]:
    """Medians, and the share of the step thread's time that reports take at the interval of the service.

    A report comes once in `REQUEST_REPORT_INTERVAL_S` of steps, whatever one step takes, so that the share of
    the time is also the mean share of a step.
    """
    report_ms = statistics.median(reports_ms)
    return {
        "step_ms": round(statistics.median(steps_ms), 3),
        "report_ms": round(report_ms, 4),
        "report_per_step_time": round(report_ms / statistics.median(steps_ms), 4),
        "share": round(report_ms / (REQUEST_REPORT_INTERVAL_S * 1e3), 6),
        "reports": len(reports_ms),
    }


async def _measure(engine: MeasuredEngine, wire: Wire, api_server: Wire) -> tuple[list[float], list[float]]:
    """Durations of the steps with a full batch, and of the reports of a full batch, in ms."""
    from pd_serve.instance.token_publisher import TokenPublisher

    publisher, client = TokenPublisher("instance", wire), api_server.listen_for_frames(lambda frames: None)
    number = 0

    def send(held: list[HeldRequest]) -> None:
        nonlocal number
        number += 1
        publisher.report(client, RequestReport(number, number, held))

    dice = random.Random(0)
    point = Point("decode", BATCH_SIZE, PROMPT_TOKENS)
    steps_ms: list[float] = []
    reports_ms: list[float] = []
    for _ in range(ROUNDS):
        stepping = asyncio.ensure_future(engine.steps(point, dice))
        while not stepping.done():
            num_requests, ms = await engine.report_ms(send)
            if num_requests >= BATCH_SIZE:
                reports_ms.append(ms)
            await asyncio.sleep(PAUSE_S)
        steps_ms += [step.ms for step in await stepping if step.decodes == BATCH_SIZE]
    publisher.close()
    return steps_ms, reports_ms
