"""Targets of requests: from headers and bodies, and refusals of what cannot be met."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from pd_serve.api.identity import IdentityMiddleware
from pd_serve.api.slo import given_slo, refuse_unattainable, request_slo
from pd_serve.errors import InvalidRequestError, RequestRefusedError
from router.request import NewRequest
from router.slo import NO_SLO, Slo

Headers = list[tuple[bytes, bytes]]
TTFT, ITL = b"x-slo-ttft-ms", b"x-slo-itl-ms"


def parameters(**fields: Any) -> Any:
    return SimpleNamespace(extra_args=fields or None)


async def within(headers: Headers, call: Callable[[], Slo]) -> Slo:
    """Calls in the task of an HTTP request with these headers."""
    found: list[Slo] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(call())

    async def unused(*_: Any) -> Message:
        raise AssertionError

    await IdentityMiddleware(app)({"type": "http", "headers": headers}, unused, unused)
    return found[0]


async def test_headers_are_milliseconds() -> None:
    headers = [(TTFT, b"3000"), (ITL, b" 50.5 ")]

    assert await within(headers, lambda: given_slo(parameters())) == Slo(3.0, 0.0505)


async def test_a_field_of_the_body_goes_before_the_header() -> None:
    headers = [(TTFT, b"3000"), (ITL, b"50")]

    assert await within(headers, lambda: given_slo(parameters(slo_ttft_ms=200))) == Slo(0.2, 0.05)


async def test_headers_of_an_earlier_request_are_gone() -> None:
    await within([(TTFT, b"3000")], lambda: given_slo(parameters()))

    assert given_slo(parameters()) == given_slo(None) == NO_SLO


async def test_targets_of_the_service_are_for_what_a_request_leaves_open() -> None:
    service = Slo(4.0, 0.1)
    assert request_slo(parameters(), service) == service
    assert request_slo(parameters(slo_itl_ms="20"), service) == Slo(4.0, 0.02)
    assert request_slo(parameters(slo_ttft_ms=9000), service) == Slo(9.0, 0.1)
    assert request_slo(None, NO_SLO) == NO_SLO


@pytest.mark.parametrize(
    "text", [b"", b"nan", b"inf", b"-inf", b"-1", b"0", b"1e300", b"1e-400", b"3s", b"1, 2"]
)
async def test_a_header_that_is_no_target_is_an_error(text: bytes) -> None:
    with pytest.raises(InvalidRequestError, match=r"^x-slo-ttft-ms: .*must be"):
        await within([(TTFT, text)], lambda: given_slo(parameters()))


async def test_a_header_that_was_sent_twice_is_an_error() -> None:
    with pytest.raises(InvalidRequestError, match="x-slo-itl-ms: was sent 2 times"):
        await within([(ITL, b"50"), (ITL, b"50")], lambda: given_slo(parameters()))


@pytest.mark.parametrize("value", [None, True, [100], {"a": 1}, "soon", 10**400, -5, 0.0, 6_000_000])
def test_a_field_that_is_no_target_is_an_error(value: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"^slo_ttft_ms: .*must be"):
        given_slo(parameters(slo_ttft_ms=value))


def test_a_time_per_token_in_seconds_is_a_mistake_in_the_unit() -> None:
    with pytest.raises(InvalidRequestError, match=r"^slo_itl_ms: .*write ms for milliseconds"):
        given_slo(parameters(slo_itl_ms=50_000))


# ---- refusals


class Predicted:
    """A cluster that predicts; None before anything is measured."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.asked: list[NewRequest] = []

    def first_token_s(self, request: NewRequest, arriving_tokens: int) -> float | None:
        self.asked.append(request)
        return self.seconds


@pytest.mark.parametrize(("predicted_s", "after_s"), [(2.01, 1), (5.2, 4), (1e6, 60)])
def test_a_target_out_of_reach_is_refused_until_it_may_be_met(predicted_s: float, after_s: int) -> None:
    with pytest.raises(RequestRefusedError, match="the target of the request is 2 s") as refused:
        refuse_unattainable(Predicted(predicted_s), Slo(2.0, 0.1), 100, 0)  # type: ignore[arg-type]

    assert (refused.value.code, refused.value.retry_after_s) == ("slo_unattainable", after_s)


@pytest.mark.parametrize("predicted_s", [None, 0.0, 2.0])
def test_a_target_within_reach_or_unknown_is_not_refused(predicted_s: float | None) -> None:
    cluster = Predicted(predicted_s)

    refuse_unattainable(cluster, Slo(2.0, 0.1), 100, -1)  # type: ignore[arg-type]

    assert [(one.prompt_tokens, one.priority, one.arrives_later_s) for one in cluster.asked] == [
        (100, -1, -8.0)
    ]


def test_a_request_without_a_target_for_its_first_token_is_never_refused() -> None:
    cluster = Predicted(1e6)

    refuse_unattainable(cluster, Slo(math.inf, 0.01), 100, 0)  # type: ignore[arg-type]

    assert not cluster.asked
