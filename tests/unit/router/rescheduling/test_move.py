"""Orders to move a request: their reason, and between which instances."""

import pytest

from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.rescheduling.move import NoMoves, make_move, pools
from router.settings import PolicySet
from tests.unit.router.made_loads import decode, neutral, prefill

POLICIES = PolicySet("mine", selection="shortest")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (decode("d0", free=10, running=9), "balance"),
        (decode("d0", free=10, running=9, head_of_line_blocks=10), "balance"),
        (decode("d0", free=10, running=9, head_of_line_blocks=11), "defragment"),
        (decode("d0", free=10, running=9, head_of_line_blocks=9, watermark_blocks=2), "defragment"),
        (decode("d0", free=10, running=9, preempted=1), "defragment"),
        (decode("d0", free=10, running=9, preempted=1, draining=True), "drain"),
    ],
)
def test_the_reason_follows_from_the_load_of_the_source(source: InstanceLoad, reason: str) -> None:
    order = make_move(source, decode("d1"), POLICIES)

    assert (order.source, order.destination.instance_id, order.reason) == ("d0", "d1", reason)
    assert order.selection == PolicyChoice("drain" if reason == "drain" else "shortest")
    assert order.num_blocks == 10, "90 blocks in use by 9 requests"


def test_neutral_and_decode_instances_move_requests_among_their_own_kind_only() -> None:
    loads = [neutral("n0"), decode("d0"), prefill("p0"), decode("d1")]

    assert [[load.instance_id for load in pool] for pool in pools(loads)] == [["n0"], ["d0", "d1"]]


def test_the_policy_without_moves_moves_nothing_from_a_draining_instance() -> None:
    assert NoMoves().moves([decode("d0", draining=True), decode("d1")], POLICIES) == []
