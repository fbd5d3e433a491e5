"""Prefix-aware dispatch."""

import random

from msgspec.structs import replace

from router.dispatch.prefix import LongestPrefix
from router.load import InstanceLoad
from router.request import NewRequest
from tests.unit.router.made_loads import prefill

PROMPT = NewRequest(400, prefix_keys=(1, 2, 3))


def chosen(*loads: InstanceLoad) -> str | None:
    found = LongestPrefix().choose(loads, PROMPT, random.Random(0))
    return found and found.instance_id


def holder(name: str, backlog: int, cached: int) -> InstanceLoad:
    return replace(prefill(name, backlog), cached_tokens=cached)


def test_the_instance_with_the_longest_prefix_is_preferred() -> None:
    assert chosen(holder("p0", 0, 0), holder("p1", 0, 16), holder("p2", 0, 128)) == "p2"


def test_a_backlog_that_outweighs_the_prefix_is_avoided() -> None:
    assert chosen(holder("p0", 0, 0), holder("p1", 128, 128)) == "p0"  # equal: the first one
    assert chosen(holder("p0", 0, 0), holder("p1", 127, 128)) == "p1"


def test_without_instances_there_is_no_choice() -> None:
    assert chosen() is None
