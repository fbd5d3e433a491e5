"""The CRC of output tokens."""

import zlib
from array import array

from hypothesis import given
from hypothesis import strategies as st

from migration.token_span import crc_of

#: No tokenizer has ids below 0. An engine that sends one must not end by it, nor its API server.
IDS = st.integers(-(2**63), 2**63 - 1)
TOKENS = st.lists(IDS, max_size=20)


@given(TOKENS, TOKENS)
def test_the_crc_goes_on_where_it_ended(before: list[int], after: list[int]) -> None:
    assert crc_of(after, crc_of(before)) == crc_of([*before, *after])


@given(TOKENS.filter(bool), st.data())
def test_another_token_is_another_crc(tokens: list[int], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(tokens) - 1))
    other = data.draw(IDS.filter(lambda token: token != tokens[index]))
    assert crc_of([*tokens[:index], other, *tokens[index + 1 :]]) != crc_of(tokens)


@given(TOKENS, st.integers(0, 2**32 - 1))
def test_the_crc_is_that_of_64_bit_integers_however_many_there_are(tokens: list[int], before: int) -> None:
    """All API servers and instances compute the same, also of another version."""
    assert crc_of(tokens, before) == zlib.crc32(array("q", tokens), before)
