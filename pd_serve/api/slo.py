"""The targets that a request brings, and its refusal if the first of them cannot be met."""

import math
from typing import TYPE_CHECKING

from pd_serve.api.cluster_view import ClusterView
from pd_serve.api.identity import header_values
from pd_serve.api.overload import arriving_tokens
from pd_serve.errors import InvalidRequestError, RequestRefusedError
from pd_serve.setting_types import checked_slo
from router.request import NewRequest
from router.slo import Slo

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

#: Headers, and fields of `vllm_xargs` in the body, which go before them. Milliseconds.
HEADERS = TTFT_HEADER, ITL_HEADER = "x-slo-ttft-ms", "x-slo-itl-ms"
FIELDS = "slo_ttft_ms", "slo_itl_ms"

#: `code` of a refusal, and the longest `Retry-After`, in seconds.
UNATTAINABLE = "slo_unattainable"
MAX_RETRY_AFTER_S = 60


def given_slo(parameters: "SamplingParams | None") -> Slo:
    """The targets of the request of this task, without those of the service.

    Raises:
        InvalidRequestError: One is no time, out of its range, or was sent twice.
    """
    fields = (parameters.extra_args if parameters is not None else None) or {}
    seconds = []
    for header, field in zip(HEADERS, FIELDS, strict=True):
        values: list[object] = [fields[field]] if field in fields else [*header_values(header)]
        name = field if field in fields else header
        if len(values) > 1:
            raise InvalidRequestError(f"{name}: was sent {len(values)} times")
        seconds.append(_seconds(name, values[0]) if values else math.inf)
        try:
            slo = checked_slo(*seconds)
        except ValueError as error:
            raise InvalidRequestError(f"{name}: {error}") from None
    return slo


def request_slo(parameters: "SamplingParams | None", service: Slo) -> Slo:
    """The targets of the request of this task: its own ones, or those of the service."""
    own = given_slo(parameters)
    return Slo(
        service.ttft_s if own.ttft_s == math.inf else own.ttft_s,
        service.tpot_s if own.tpot_s == math.inf else own.tpot_s,
    )


def refuse_unattainable(cluster: ClusterView, slo: Slo, prompt_tokens: int, priority: int) -> None:
    """Refuses a request whose first token would come after its target, as far as that can be predicted.

    Args:
        slo: The request's own targets: those of the service refuse nothing.

    Raises:
        RequestRefusedError: No instance would have computed the prompt in time.
    """
    if slo.ttft_s == math.inf:
        return
    request = NewRequest(prompt_tokens, priority, slo=slo, arrives_later_s=-slo.lead_s)
    predicted_s = cluster.first_token_s(request, arriving_tokens())
    if predicted_s is None or predicted_s <= slo.ttft_s:
        return
    raise RequestRefusedError(
        f"The first token would come after {predicted_s:.3g} s, and the target of the request is"
        f" {slo.ttft_s:.3g} s; try again later.",
        UNATTAINABLE,
        min(max(math.ceil(predicted_s - slo.ttft_s), 1), MAX_RETRY_AFTER_S),
    )


def _seconds(name: str, value: object) -> float:
    """A time in ms, from a header or a body. Raises: InvalidRequestError: it is none."""
    try:
        ms = (
            float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
        )
    except (ValueError, OverflowError):
        ms = math.nan
    if not math.isfinite(ms):
        raise InvalidRequestError(f"{name}: must be a number of milliseconds, not {str(value)[:40]!r}")
    return ms / 1e3
