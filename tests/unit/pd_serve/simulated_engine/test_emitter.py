"""Outputs of a simulated engine that are sent, and sent again."""

from collections.abc import Callable

from migration.engine_interface import HeldRequest
from migration.messages import RequestId
from migration.token_span import TokenSpan, crc_of
from pd_serve.simulated_engine.contents import SegmentPrompt
from pd_serve.simulated_engine.emitter import SequenceEmitter
from pd_serve.simulated_engine.outputs import SimulatedOutput
from pd_serve.simulated_engine.sequence import Sequence

R = RequestId("r")


class World:
    """The emitter of an engine with the request `r`, which ends after three tokens."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, list[int], object, TokenSpan]] = []
        self.prompts: list[tuple[int, int] | None] = []
        self.sequence = Sequence(R, SegmentPrompt(8, (), 16, 0), 3, 0, 0.0, [], client="api", epoch=2)
        self.sequences = {"r": self.sequence}
        clock: Callable[[], float] = lambda: 0.0  # noqa: E731
        self.emitter = SequenceEmitter(self.sequences, self._sink, clock)

    def _sink(self, client: str, outputs: list[SimulatedOutput], spans: list[TokenSpan]) -> None:
        for output, span in zip(outputs, spans, strict=True):
            self.sent.append((client, output.new_token_ids, output.finish_reason, span))
            self.prompts.append(output.prompt)

    def step(self, token: int) -> None:
        self.sequence.output.append(token)
        for sequence in self.emitter.emit([self.sequence], 0.0):
            del self.sequences[sequence.request_id]


def test_a_request_is_sent_again_from_an_index_on() -> None:
    world = World()
    world.step(10)
    world.step(11)
    world.sent.clear()

    world.emitter.resend([(R, 0), (R, 1), (RequestId("unknown"), 0)], 0.0)

    assert world.sent == [("api", [10, 11], None, (2, 0, 0)), ("api", [11], None, (2, 1, crc_of([10])))]
    assert world.emitter.held() == {"api": [HeldRequest(R, 2, 2)]}


def test_the_first_token_comes_with_the_numbers_of_the_prompt_also_when_it_is_sent_again() -> None:
    world = World()
    world.sequence.cached = 4
    world.step(10)
    world.step(11)

    world.emitter.resend([(R, 0), (R, 1)], 0.0)

    assert world.prompts == [(8, 4), None, (8, 4), None]


def test_an_ended_request_is_sent_again_with_its_end() -> None:
    world = World()
    for token in (10, 11, 12):
        world.step(token)
    world.sent.clear()

    world.emitter.resend([(R, 2)], 0.0)

    assert world.sent == [("api", [12], "length", (2, 2, crc_of([10, 11])))]
    assert world.emitter.held() == {"api": [HeldRequest(R, 2, 3, finished=True)]}
