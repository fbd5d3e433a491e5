"""Workloads of sessions: each turn's prompt is the last one's prompt, its answer, and new text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.arrivals import Arrivals, drawn
from pd_serve.simulation.config import TraceRequest
from pd_serve.simulation.lengths import MEDIUM, Distribution, Fixed

#: Turns of each session, if the name of the trace has no number; mean time from an answer to the next turn.
TURNS, THINK_S = 4, 10.0


@dataclass(frozen=True, slots=True)
class Turn:
    """Lengths of one turn, in tokens: of the text that is new in it, and of its answer."""

    text: Distribution
    answer: Distribution


def turns_of(name: str) -> tuple[Turn, ...]:
    """The turns of each session of a trace; none if it has no sessions.

    Args:
        name: `sessions` or `sessions:TURNS` for new text and answers with the lengths of the paper's
            distribution M, or fixed lengths of each turn: `TEXT:ANSWER+TEXT:ANSWER`, and so on.
    """
    if found := re.fullmatch(r"sessions(?::([1-9]\d*))?", name.lower()):
        return (Turn(MEDIUM, MEDIUM),) * int(found[1] or TURNS)
    if re.fullmatch(r"[1-9]\d*:[1-9]\d*(\+[1-9]\d*:[1-9]\d*)+", name):
        pairs = [turn.split(":") for turn in name.split("+")]
        return tuple(Turn(Fixed(int(text)), Fixed(int(answer))) for text, answer in pairs)
    return ()


def make_sessions(
    turns: Sequence[Turn], count: int, rate: float | None, arrivals: str | None, seed: int
) -> list[TraceRequest]:
    """Requests in the order of the sessions' first turns; the turns of a session follow each other.

    Thinking is exponential.

    Args:
        count: Requests, rounded up to whole sessions.
        rate: Requests/s; sessions start at this rate divided by the number of turns.

    Raises:
        InvalidRequestError: There is no rate, or the arrivals are recorded.
    """
    kind = Arrivals.parse(arrivals or "poisson")
    if rate is None or kind.kind == "recorded":
        raise InvalidRequestError("sessions have no recorded arrivals: a rate is needed")
    sessions = -(-count // len(turns))
    starts = drawn(kind, rate / len(turns), sessions, np.random.RandomState([seed, 1]))
    dice = np.random.RandomState([seed, 3])
    texts = [turn.text.draw(sessions, dice) for turn in turns]
    answers = [turn.answer.draw(sessions, dice) for turn in turns]
    thinking = dice.exponential(THINK_S, (len(turns), sessions))
    requests: list[TraceRequest] = []
    for session in range(sessions):
        prompt = 0
        for turn in range(len(turns)):
            prompt += int(texts[turn][session])
            answer = int(answers[turn][session])
            first = turn == 0
            at_s = float(starts[session] if first else thinking[turn, session])
            before = None if first else len(requests) - 1
            requests.append(TraceRequest(at_s, prompt, answer, turn_of=before))
            prompt += answer
    return requests
