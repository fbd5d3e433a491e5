"""Changes of a set of keys, as they are taken from it."""

from hypothesis import given
from hypothesis import strategies as st

from migration.cached_keys import ChangeRecord, key_of

KEYS = range(6)


@given(st.lists(st.one_of(st.sampled_from(KEYS), st.sampled_from(["take", "restart"])), max_size=60))
def test_whoever_takes_all_changes_has_the_keys_that_are_there(steps: list[int | str]) -> None:
    there: set[int] = set()
    seen: set[int] = set()
    record: ChangeRecord[int] = ChangeRecord()

    def take() -> None:
        gained, lost, anew = record.take(2)
        assert len(gained) + len(lost) <= 2
        if anew:
            seen.clear()
        assert not seen & set(gained)
        assert set(lost) <= seen
        seen.update(gained)
        seen.difference_update(lost)

    for step in steps:
        if step == "take":
            take()
        elif step == "restart":
            there = {1, 3, 5}
            record.restart(there)
        elif step in there:
            there.remove(step)  # type: ignore[arg-type]
            record.lost(step)  # type: ignore[arg-type]
        else:
            there.add(step)  # type: ignore[arg-type]
            record.gained(step)  # type: ignore[arg-type]
        assert len(record) <= len(there) + len(seen)
    while record:
        take()
    assert record.is_new or seen == there


def test_what_was_gained_and_lost_again_is_no_change() -> None:
    record: ChangeRecord[str] = ChangeRecord()
    record.gained("a")
    record.gained("b")
    record.take(10)
    record.lost("a")
    record.gained("a")
    record.gained("c")
    record.lost("c")

    assert record.take(10) == ([], [], False)


def test_a_key_is_the_beginning_of_a_hash() -> None:
    assert key_of(bytes(range(32))) == 0x0001020304050607
