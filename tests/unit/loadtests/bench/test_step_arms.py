"""The parts of both arms of the benchmark of the engine's step that need no engine."""

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder

from loadtests.bench.step_arms import BATCH_SIZE, MOVED, Requests, full
from loadtests.bench.step_clock import RecordedStep


def test_only_steps_in_which_the_whole_batch_decodes_count() -> None:
    decode = RecordedStep(4, 4, 1, 1, 1)
    others = [RecordedStep(3, 3, 1, 1, 1), RecordedStep(4, 67, 1, 1, 1), RecordedStep(5, 5, 1, 1, 1)]

    assert full([*others, decode], 4) == [decode]


def test_both_arms_get_the_same_requests_and_each_round_others() -> None:
    decoder = MsgpackDecoder(EngineCoreRequest)
    first = {name: decoder.decode(payload).prompt_token_ids for name, payload in Requests().batch(1).items()}
    again = {name: decoder.decode(payload).prompt_token_ids for name, payload in Requests().batch(1).items()}

    assert first == again
    assert len(first) == BATCH_SIZE
    assert len(Requests().moved()) == MOVED
    assert not first.keys() & Requests().batch(2).keys()
