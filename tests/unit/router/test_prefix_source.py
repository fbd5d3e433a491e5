"""Where a prefix is copied from, and when computing it is sooner."""

from msgspec.structs import replace

from router.load import InstanceLoad
from router.prefix_source import COPY_LATENCY_S, MIN_TOKENS, prefix_source
from tests.unit.router.made_loads import decode, prefill

READER = replace(prefill("p0"), block_tokens=16, prompt_token_s=1e-3, block_copy_s=1e-3)


def holder(name: str, cached: int, **changes: object) -> InstanceLoad:
    return replace(decode(name), cached_tokens=cached, **changes)  # type: ignore[arg-type]


def test_the_longest_prefix_is_copied() -> None:
    source = prefix_source([holder("d0", 160), holder("d1", 640), holder("d2", 320)], READER)
    assert source is not None
    assert (source.holder, source.tokens) == ("d1", 640)
    assert source.seconds == COPY_LATENCY_S + 40 * 1e-3


def test_only_what_the_reader_lacks_counts() -> None:
    reader = replace(READER, cached_tokens=480)
    source = prefix_source([holder("d0", 640)], reader)
    assert source is not None
    assert source.tokens == 160
    assert prefix_source([holder("d0", 480)], reader) is None
    assert prefix_source([holder("d0", 480 + MIN_TOKENS - 1)], reader) is None


def test_a_slow_link_or_a_slow_holder_is_no_source() -> None:
    assert prefix_source([holder("d0", 640)], replace(READER, block_copy_s=0.016)) is None
    assert prefix_source([holder("d0", 640, decode_step_s=1.4)], READER) is None


def test_nothing_is_copied_before_prompts_have_been_measured() -> None:
    assert prefix_source([holder("d0", 640)], replace(READER, prompt_token_s=0.0)) is None


def test_a_first_copy_is_tried() -> None:
    assert prefix_source([holder("d0", 640)], replace(READER, block_copy_s=0.0)) is not None


def test_the_reader_is_no_source_of_its_own_prefix() -> None:
    reader = replace(READER, cached_tokens=100)
    assert prefix_source([replace(reader, cached_tokens=640)], reader) is None
    assert prefix_source([], READER) is None


def test_of_equal_prefixes_the_one_on_the_same_machine_is_copied() -> None:
    reader = replace(READER, far_block_copy_s=5e-3)
    holders = [holder("d0", 640), holder("d1", 640)]

    source = prefix_source(holders, reader, lambda one, other: one == "d0")
    assert source is not None
    assert (source.holder, source.seconds) == ("d1", COPY_LATENCY_S + 40 * 1e-3)


def test_a_longer_prefix_far_away_is_copied_if_that_saves_more() -> None:
    """Computing a block takes 16 ms here."""
    holders = [holder("d0", 1280), holder("d1", 640)]
    chosen = {}
    for far_s in (5e-3, 15e-3):
        reader = replace(READER, far_block_copy_s=far_s)
        source = prefix_source(holders, reader, lambda one, other: one == "d0")
        assert source is not None
        chosen[far_s] = source.holder
    assert chosen == {5e-3: "d0", 15e-3: "d1"}


def test_no_prefix_is_copied_from_far_if_computing_it_is_sooner() -> None:
    reader = replace(READER, far_block_copy_s=17e-3)
    assert prefix_source([holder("d0", 640)], reader, lambda one, other: True) is None


def test_the_reader_among_the_holders_hides_no_other_one() -> None:
    reader = replace(READER, cached_tokens=320)
    assert prefix_source([replace(reader, cached_tokens=640), holder("d0", 480)], reader) is not None
