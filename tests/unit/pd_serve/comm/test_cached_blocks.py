"""Keys as they travel."""

import struct

import pytest

from pd_serve.comm.cached_blocks import packed, unpacked


def test_keys_are_the_same_after_their_way() -> None:
    keys = (0, 1, 2**63, 2**64 - 1)

    assert len(packed(keys)) == 32
    assert unpacked(packed(keys)) == keys
    assert unpacked(packed([])) == ()


def test_a_part_of_a_key_is_an_error() -> None:
    with pytest.raises(struct.error):
        unpacked(packed([1, 2])[:-1])
