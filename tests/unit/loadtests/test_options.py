"""The load test's own options: accepted values, and messages of refused ones."""

import argparse

import pytest

from loadtests.options import Limit, LoadOptions, add_to, parse_slo, slo_text
from pd_serve.errors import InvalidRequestError


def parsed(*arguments: str) -> LoadOptions:
    parser = argparse.ArgumentParser()
    add_to(parser)
    parser.add_argument("--run-time", type=int)  # Locust's
    return LoadOptions.from_parsed(parser.parse_args(arguments))


def test_an_slo_is_parsed_with_its_units() -> None:
    slo = parse_slo("ttft=2s, tpot=80ms,gap=.5s,e2e=30.5s")
    assert slo == (Limit("ttft", 2.0), Limit("tpot", 0.08), Limit("gap", 0.5), Limit("e2e", 30.5))
    assert slo_text(slo) == "ttft ≤ 2 s, tpot ≤ 0.08 s, gap ≤ 0.5 s, e2e ≤ 30.5 s"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ttft=2", "with its unit, as ttft=200ms"),
        ("ttft=-2s", "with its unit"),
        ("ttft=0s", "with its unit"),
        ("ttft", "with its unit"),
        ("", "'' has no limit"),
        ("p99=2s", "'p99' has no limit; there are ttft, tpot, gap, e2e"),
        ("ttft=2s,ttft=3s", "two limits of one name"),
    ],
)
def test_a_malformed_slo_is_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=says):
        parse_slo(text)


def test_options_have_defaults_and_keep_given_values() -> None:
    assert parsed().shape == "steady"
    assert parsed().slo == ()
    options = parsed(
        "--trace", "m-m", "--rate", "3", "--arrivals", "gamma:2", "--slo", "ttft=1s", "--goodput", "1"
    )
    assert (options.trace, options.rate, options.arrivals, options.goodput) == ("m-m", 3.0, "gamma:2", 1.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rate", "0"], "must be above 0"),
        (["--rate-scale", "-1"], "must be above 0"),
        (["--requests", "0"], "must be at least 1"),
        (["--high-priority", "1.5"], "must be from 0 to 1"),
        (["--arrivals", "gamma"], "gamma:CV"),
        (["--shape", "flat"], "invalid choice"),
    ],
)
def test_an_invalid_value_is_refused_with_the_reason(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(*arguments)
    assert says in capsys.readouterr().err


def test_goodput_without_an_slo_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="--goodput needs --slo"):
        parsed("--goodput", "0.9")
