"""Dispatch by the time of the first token."""

import random

import pytest
from msgspec.structs import replace

from router.dispatch.soonest import Soonest, first_token_s
from router.load import InstanceLoad
from router.request import NewRequest
from tests.unit.router.made_loads import decode, prefill


def measured(load: InstanceLoad, **changes: object) -> InstanceLoad:
    base = {"prompt_token_s": 1e-3, "decode_step_s": 0.02, "step_prompt_tokens": 2048}
    return replace(load, **(base | changes))  # type: ignore[arg-type]


def chosen(prompt_tokens: int, *loads: InstanceLoad, patience: float = 1.0) -> str | None:
    found = Soonest(patience).choose(loads, NewRequest(prompt_tokens), random.Random(0))
    return found and found.instance_id


PREFILL = measured(prefill("p0"))
BUSY = measured(prefill("p0", 2000))
DECODE = measured(decode("d0"), running=8, step_prompt_tokens=256)


def test_a_prompt_starts_on_an_idle_prefill_instance() -> None:
    assert chosen(300, PREFILL, DECODE) == "p0"


def test_a_prompt_whose_prefix_a_decode_instance_has_starts_there() -> None:
    assert chosen(1000, PREFILL, replace(DECODE, cached_tokens=900)) == "d0"


def test_a_prefix_that_can_be_copied_leaves_it_on_the_prefill_instance() -> None:
    reader = replace(PREFILL, copied_tokens=900, copy_s=0.01)
    assert chosen(1000, reader, replace(DECODE, cached_tokens=900)) == "p0"


def test_a_burst_overflows_to_decode_instances() -> None:
    assert chosen(300, BUSY, DECODE) == "d0"
    assert chosen(300, BUSY, replace(DECODE, waiting_tokens=2500)) == "p0"


def test_patience_keeps_prompts_on_prefill_instances() -> None:
    assert chosen(1000, PREFILL, replace(DECODE, cached_tokens=900), patience=10.0) == "p0"


def test_unmeasured_instances_count_as_the_others() -> None:
    new = measured(prefill("p1"), prompt_token_s=0.0)
    assert chosen(300, BUSY, new) == "p1"
    assert chosen(300, replace(BUSY, prompt_token_s=0.0), new) == "p1"


def test_without_instances_there_is_no_choice() -> None:
    assert chosen(10) is None


def test_steps_with_other_requests_cost_their_decode_time() -> None:
    assert first_token_s(DECODE, 512, 1e-3) == pytest.approx(0.512 + 2 * 0.02)
    assert first_token_s(replace(DECODE, running=0), 512, 1e-3) == pytest.approx(0.512)
    assert first_token_s(replace(DECODE, cached_tokens=600), 512, 1e-3) == pytest.approx(0.001 + 0.02)


def test_each_step_of_an_idle_engine_takes_at_least_its_shortest_one() -> None:
    """257 tokens within 256 a step are two steps."""
    idle = replace(DECODE, running=0, least_step_s=0.008)
    assert first_token_s(idle, 256, 1e-4) == pytest.approx(0.0256 + 0.008)
    assert first_token_s(idle, 257, 1e-4) == pytest.approx(0.0257 + 2 * 0.008)
