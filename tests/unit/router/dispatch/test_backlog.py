"""Least backlog."""

import random

from router.dispatch.backlog import LeastBacklog
from router.load import InstanceLoad
from router.request import NewRequest
from tests.unit.router.made_loads import prefill


def choose(*loads: InstanceLoad) -> str | None:
    chosen = LeastBacklog().choose(loads, NewRequest(100), random.Random(0))
    return chosen and chosen.instance_id


def test_backlog_ties_go_to_the_smaller_batch_then_by_name() -> None:
    assert choose(prefill("p0", running=2), prefill("p1", running=1)) == "p1"
    assert choose(prefill("p0", running=1), prefill("p1", waiting=2)) == "p0"
    assert choose(prefill("p1"), prefill("p0")) == "p0"
