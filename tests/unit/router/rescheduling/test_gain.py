"""Whether a move is worth it."""

from hypothesis import given
from hypothesis import strategies as st

from router.load import InstanceLoad
from router.rescheduling.gain import freeness_or_deficit, is_worth_moving

FULL = InstanceLoad("full", "neutral", total_blocks=851, free_blocks=20, running=30, watermark_blocks=8)
FREE = InstanceLoad("free", "neutral", total_blocks=851, free_blocks=600, running=10, watermark_blocks=8)


@given(st.integers(0, 851), st.integers(1, 60), st.integers(1, 200))
def test_fewer_requests_on_an_instance_never_make_it_less_free(free: int, running: int, blocks: int) -> None:
    """Also where blocks are missing: the batch must not hide how many."""
    blocks = min(blocks, 851 - free)
    for load in (
        InstanceLoad("i0", "neutral", total_blocks=851, free_blocks=free, running=running),
        InstanceLoad(
            "i0", "neutral", total_blocks=851, free_blocks=free, running=running, head_of_line_blocks=800
        ),
        InstanceLoad("i0", "neutral", total_blocks=851, free_blocks=free, running=running, high_priority=1),
    ):
        assert freeness_or_deficit(load.with_departures(blocks)) >= freeness_or_deficit(load)
        assert freeness_or_deficit(load.with_arrivals(blocks)) <= freeness_or_deficit(load)


def test_a_move_to_an_instance_without_space_is_not_worth_it() -> None:
    assert is_worth_moving(FULL, FREE, 500)
    assert not is_worth_moving(FULL, FREE, 593)
    assert not is_worth_moving(FULL, FREE.with_arrivals(100), 493)
