"""Frames and their mutations."""

import random

import pytest

from loadtests.fuzz import frames
from loadtests.fuzz.frames import MOST_BYTES, FrameMaker
from loadtests.fuzz.ports import Protocol


def test_a_greeting_has_64_bytes_and_its_mechanism() -> None:
    greeting = frames.greeting(b"CURVE")

    assert len(greeting) == 64
    assert greeting[:12] == b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01"
    assert greeting[12:18] == b"CURVE\0"


def test_lengths_of_frames_are_their_own() -> None:
    assert frames.command(b"READY", b"abc") == b"\x04\x09\x05READYabc"
    assert frames.command(b"X", bytes(300))[:9] == b"\x06" + (302).to_bytes(8, "big")
    assert frames.message(b"ab", more=True) == b"\x01\x02ab"
    assert frames.message(bytes(256))[:9] == b"\x02" + (256).to_bytes(8, "big")


@pytest.mark.parametrize("protocol", Protocol)
def test_the_same_seed_makes_the_same_frames(protocol: Protocol) -> None:
    first, again, other = (FrameMaker(seed, "sk-key", "tiny") for seed in (1, 1, 2))
    made = [first.conversation(protocol) for _ in range(50)]

    assert made == [again.conversation(protocol) for _ in range(50)]
    assert made != [other.conversation(protocol) for _ in range(50)]


@pytest.mark.parametrize("protocol", Protocol)
def test_frames_are_bounded_and_differ(protocol: Protocol) -> None:
    maker = FrameMaker(3, "sk-key", "tiny")
    made = [tuple(maker.conversation(protocol)) for _ in range(500)]

    assert all(conversation for conversation in made)
    assert max(len(frame) for conversation in made for frame in conversation) <= MOST_BYTES
    assert len(set(made)) > 450


def test_a_mutated_frame_is_another_one() -> None:
    maker = FrameMaker(4, "sk-key", "tiny")
    frame = frames.greeting()

    assert all(maker.mutated(frame, Protocol.ZMTP) != frame for _ in range(500))
    assert maker.mutated(b"", Protocol.SILENT) != b""


def test_recorded_handshakes_are_mutated_too() -> None:
    recorded = [b"greeting-of-a-peer", b"hello-of-a-peer"]
    maker = FrameMaker(5, "sk-key", "tiny", [recorded])
    made = [maker.conversation(Protocol.ZMTP) for _ in range(200)]

    assert any(recorded[0] in conversation for conversation in made)
    assert recorded not in made


def test_no_request_changes_the_cluster() -> None:
    heads = [one[0].split(b" ")[:2] for one in frames.http("sk-key", "tiny")]

    assert all(not path.startswith(b"/cluster") for method, path in heads if method != b"GET")
    assert [b"GET", b"/cluster"] in heads


def test_conversations_of_a_stranger_have_no_key() -> None:
    conversations = frames.zmtp(random.Random(0)) + frames.silent(random.Random(0)) + frames.grpc()

    assert not any(b"sk-key" in frame for conversation in conversations for frame in conversation)
    assert sum(b"sk-key" not in b"".join(one) for one in frames.http("sk-key", "tiny")) > 3
