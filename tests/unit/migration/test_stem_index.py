"""Finding requests by the stem of their ids."""

from migration.messages import RequestId, stem_of
from migration.stem_index import StemIndex

A, B, C = (RequestId(name) for name in ("mine.digest-1", "mine.digest-2", "other.digest-1"))


def test_ids_are_found_by_all_but_their_random_end() -> None:
    index = StemIndex()
    for request_id in (A, C, B, A):
        index.add(request_id)

    assert index["mine.digest"] == [A, B]
    assert index["other.digest"] == [C]
    assert index["mine"] == index[""] == []


def test_nothing_is_left_of_an_id_that_was_discarded() -> None:
    index = StemIndex()
    index.add(A)
    index.add(B)
    for request_id in (A, A, C, B):
        index.discard(request_id)

    assert index["mine.digest"] == []
    assert not index._ids


def test_ids_without_a_stem_are_not_kept() -> None:
    index = StemIndex()
    for name in ("mine", "mine.-1", "mine.digest.-1"):
        assert stem_of(name) == ""
        index.add(RequestId(name))

    assert not index._ids
