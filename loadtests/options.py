"""The load test's own command line options, added to those of Locust."""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.workload import SHAPES
from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.arrivals import Arrivals
from pd_serve.simulation.lengths import GENERATED
from pd_serve.simulation.trace_files import FILES

#: The latencies that can have a limit, by name: attributes of `loadtests.outcome.Outcome`.
LIMITS = {"ttft": "ttft_s", "tpot": "tpot_s", "gap": "longest_gap_s", "e2e": "e2e_s"}

APIS = ("completions", "chat", "both")
CHECKS = ("auto", "simulated", "repeat", "count")

_SECONDS = {"ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Limit:
    """One part of an SLO: a name of `LIMITS` and the greatest allowed value in seconds."""

    name: str
    most_s: float


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """The parsed options; `add_to` describes each. `run_time` is Locust's own option, in seconds."""

    trace: str
    traces: Path | None
    rate: float | None
    rate_scale: float
    requests: int | None
    max_tokens: int | None
    max_prompt_tokens: int | None
    arrivals: str | None
    shape: str
    api: str
    high_priority: float
    seed: int
    slo: tuple[Limit, ...]
    goodput: float | None
    check: str
    warm_up: int
    model: str | None
    api_key: str | None
    report: Path | None
    run_time: int | None

    @classmethod
    def from_parsed(cls, parsed: argparse.Namespace) -> "LoadOptions":
        """Raises: InvalidRequestError: Two options contradict each other."""
        if parsed.goodput is not None and not parsed.slo:
            raise InvalidRequestError("--goodput needs --slo: without limits every request is good")
        return cls(**{name: getattr(parsed, name) for name in cls.__dataclass_fields__})


def add_to(parser: argparse.ArgumentParser) -> None:
    """Adds the options to Locust's parser, or to any other."""
    group = parser.add_argument_group("load of language models")
    add = group.add_argument
    names = ", ".join([*GENERATED, *FILES])
    add("--trace", default="s-s", metavar="NAME|FILE", help=f"Lengths and arrivals: {names}, or a file.")
    add("--traces", type=Path, metavar="DIR", help="Folder of trace files. Default: $PD_SERVE_TRACES.")
    add("--rate", type=_above_zero, metavar="R", help="Mean requests/s. Required for a trace without times.")
    add("--rate-scale", type=_above_zero, default=1.0, metavar="X", help="Factor on the request rate.")
    add("--requests", type=_count, metavar="N", help="Default: all of the trace, or 10,000 generated.")
    add("--max-tokens", type=_count, metavar="N", help="Longer answers are cut to this.")
    add("--max-prompt-tokens", type=_count, metavar="N", help="Longer prompts are cut to this.")
    add(
        "--arrivals",
        type=_arrivals,
        metavar="poisson|gamma:CV|recorded",
        help="Default: the trace's own times, Poisson where it has none.",
    )
    add("--shape", choices=SHAPES, default="steady", help="How the rate changes over the run.")
    add("--api", choices=APIS, default="both", help="The route that users call.")
    add("--high-priority", type=_share, default=0.0, metavar="FRACTION", help="Share sent with priority -1.")
    add("--seed", type=int, default=0, help="Seed of arrivals and prompts.")
    add(
        "--slo",
        type=parse_slo,
        default=(),
        metavar="ttft=2s,tpot=100ms",
        help=f"Limits of a good request: {', '.join(LIMITS)}.",
    )
    add("--goodput", type=_share, metavar="SHARE", help="Exit code 3 below this share of good requests.")
    add(
        "--check",
        choices=CHECKS,
        default="auto",
        help="Expected tokens: those that a simulated engine generates for the prompt (simulated); those of "
        "the same request sent again after the load (repeat); any, in the requested number (count). "
        "auto: the first that fits the model.",
    )
    add("--warm-up", type=int, default=4, metavar="N", help="Uncounted requests before the load.")
    add("--model", help="The model's name in the API. Default: the first served model.")
    add("--api-key", default=os.environ.get("VLLM_API_KEY"), help="Default: $VLLM_API_KEY.")
    add("--report", type=Path, metavar="FILE.json", help="File for all numbers, including every request.")


def parse_slo(text: str) -> tuple[Limit, ...]:
    """Parses `ttft=2s,tpot=100ms`.

    Raises:
        argparse.ArgumentTypeError: The text has another form.
    """
    limits = []
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        number = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(ms|s)", value)
        if name not in LIMITS:
            raise argparse.ArgumentTypeError(f"{name!r} has no limit; there are {', '.join(LIMITS)}")
        if number is None or float(number[1]) == 0:
            raise argparse.ArgumentTypeError(f"{part.strip()!r}: give a time with its unit, as {name}=200ms")
        limits.append(Limit(name, float(number[1]) * _SECONDS[number[2]]))
    if len({limit.name for limit in limits}) < len(limits):
        raise argparse.ArgumentTypeError(f"{text!r} has two limits of one name")
    return tuple(limits)


def slo_text(slo: Sequence[Limit]) -> str:
    """The limits as text for reports."""
    return ", ".join(f"{limit.name} ≤ {limit.most_s:g} s" for limit in slo)


def _arrivals(text: str) -> str:
    try:
        Arrivals.parse(text)
    except InvalidRequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be from 0 to 1")
    return value
