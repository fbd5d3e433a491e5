"""The load of many users of a language model, for Locust. docs/loadtests.md describes the options.

Arrivals are an open loop: one Locust user, the dispatcher, starts each request at its time in a greenlet of
its own. Locust's own users are closed loops: they wait for the service, so a slow service gets less load.
"""

import sys
from typing import Any, NoReturn

from locust import LoadTestShape, User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser

from loadtests import options as load_options
from loadtests.answer import StreamError
from loadtests.client import StreamingClient
from loadtests.load_test import LoadTest, report
from loadtests.options import LoadOptions
from loadtests.outcome import EXIT_FAILED, EXIT_USAGE, Outcome, exit_code, summarize
from loadtests.report.text import summary_lines
from loadtests.workload import PlannedRequest, plan
from pd_serve.errors import InvalidRequestError
from pd_serve.observe.provenance import provenance, write
from pd_serve.simulation.workloads import TraceSpec


class LocustRun:
    """State shared by the hooks of this process.

    Attributes:
        planned: Planned before anything starts, so that invalid options are refused at once.
        test: None before it begins.
        failure: The reason why the load could not begin.
        over: The last request has ended, or the load could not begin.
    """

    options: LoadOptions
    planned: list[PlannedRequest]
    test: LoadTest | None = None
    failure: str | None = None
    over = False


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    load_options.add_to(parser)
    parsed, _ = parser.parse_known_args()
    if parsed.master or parsed.worker or parsed.processes:
        # Before Locust starts processes: a worker without a master waits for five minutes.
        _refuse(
            "one process makes all the load: workers cannot share the arrivals of a plan. Leave out "
            "--processes, --master and --worker; for more load start several with different --seed"
        )


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    parsed = environment.parsed_options
    assert parsed is not None
    try:
        if not parsed.host:
            raise InvalidRequestError("give the service's address: --host http://127.0.0.1:8000")
        LocustRun.options = options = LoadOptions.from_parsed(parsed)
        spec = TraceSpec(
            options.trace,
            rate=options.rate,
            requests=options.requests,
            arrivals=options.arrivals,
            priority_fraction=options.high_priority,
            seed=options.seed,
        )
        LocustRun.planned = plan(
            spec,
            api=options.api,
            shape=options.shape,
            rate_scale=options.rate_scale,
            max_tokens=options.max_tokens,
            max_prompt_tokens=options.max_prompt_tokens,
            until_s=options.run_time,
            folder=options.traces,
        )
    except InvalidRequestError as error:
        _refuse(str(error))


@events.test_stop.add_listener
def let_begin_again(**_: Any) -> None:
    """Allows a further load: Locust's web page can start several."""
    LocustRun.over = False


@events.quitting.add_listener
def judge(environment: Environment, **_: Any) -> None:
    if LocustRun.test is None or LocustRun.failure is not None:
        environment.process_exit_code = EXIT_FAILED
        return
    summary = _summary(LocustRun.test)
    environment.process_exit_code = exit_code(summary, LocustRun.options.goodput)
    if LocustRun.options.report is not None:
        write(LocustRun.options.report, provenance() | report(LocustRun.test, summary))


@events.quit.add_listener
def show(exit_code: int, **_: Any) -> None:
    if LocustRun.failure is not None:
        print(f"loadtests: error: {LocustRun.failure}", file=sys.stderr)
    elif LocustRun.test is not None:
        print("\n".join(summary_lines(_summary(LocustRun.test), LocustRun.options, LocustRun.test.check)))
        print(f"exit code {exit_code}")


class UntilAllHaveEnded(LoadTestShape):
    """Runs the dispatcher alone until the plan has ended. Locust's --run-time cuts the plan in `prepare`."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        return None if LocustRun.over else (1, 1.0)


class LoadDispatcher(User):
    """Starts the planned requests. Its rows in Locust's table are TTFT, TPOT, ITL, gap and E2E, by API."""

    @task
    def replay(self) -> None:
        client = StreamingClient(self.host or "", LocustRun.options.api_key)
        LocustRun.test = LoadTest(client, LocustRun.options, LocustRun.planned, self._show)
        try:
            LocustRun.test.run()
        except StreamError as error:
            LocustRun.failure = f"{error.kind}: {error.detail}"
        finally:
            LocustRun.over = True
        raise StopUser

    def _show(self, outcome: Outcome) -> None:
        for name, values in (
            ("TTFT", [outcome.ttft_s]),
            ("TPOT", [outcome.tpot_s]),
            ("ITL", outcome.gaps_s),
            ("gap", [outcome.longest_gap_s]),
        ):
            for value in values:
                if value is not None:
                    self._fire(name, outcome, value)
        self._fire("E2E", outcome, outcome.e2e_s, StreamError(outcome.error) if outcome.error else None)

    def _fire(self, name: str, outcome: Outcome, value_s: float, error: StreamError | None = None) -> None:
        self.environment.events.request.fire(
            request_type=name,
            name=outcome.api,
            response_time=value_s * 1e3,
            response_length=outcome.tokens if name == "E2E" else 0,
            exception=error,
            context={},
        )


def _refuse(reason: str) -> NoReturn:
    print(f"loadtests: error: {reason}", file=sys.stderr)
    sys.exit(EXIT_USAGE)


def _summary(test: LoadTest) -> dict[str, Any]:
    return summarize(test.outcomes, LocustRun.options.slo, len(test.planned))
