"""Workloads of sessions: each turn's prompt is the last one's prompt, its answer, and new text."""

import re

import numpy as np

from pd_serve.errors import InvalidRequestError
from pd_serve.simulation.arrivals import Arrivals, drawn
from pd_serve.simulation.config import TraceRequest
from pd_serve.simulation.lengths import MEDIUM

#: Turns of each session, if the name of the trace has no number; mean time from an answer to the next turn.
TURNS, THINK_S = 4, 10.0


def num_turns(name: str) -> int:
    """Turns of each session of the trace `sessions` or `sessions:TURNS`; 0 for another trace."""
    found = re.fullmatch(r"sessions(?::([1-9]\d*))?", name.lower())
    return int(found[1] or TURNS) if found else 0


def make_sessions(
    turns: int, count: int, rate: float | None, arrivals: str | None, seed: int
) -> list[TraceRequest]:
    """Requests in the order of the sessions' first turns; the turns of a session follow each other.

    New text and answers have the lengths of the paper's distribution M, thinking is exponential.

    Args:
        count: Requests, rounded up to whole sessions.
        rate: Requests/s: sessions start at a `turns`-th of it.

    Raises:
        InvalidRequestError: There is no rate, or the arrivals are recorded.
    """
    kind = Arrivals.parse(arrivals or "poisson")
    if rate is None or kind.kind == "recorded":
        raise InvalidRequestError("sessions have no recorded arrivals: a rate is needed")
    sessions = -(-count // turns)
    starts = drawn(kind, rate / turns, sessions, np.random.RandomState([seed, 1]))
    dice = np.random.RandomState([seed, 3])
    texts, answers = (MEDIUM.draw(sessions * turns, dice).reshape(sessions, turns) for _ in range(2))
    thinking = dice.exponential(THINK_S, (sessions, turns))
    requests: list[TraceRequest] = []
    for session in range(sessions):
        prompt = 0
        for turn in range(turns):
            prompt += int(texts[session, turn])
            answer = int(answers[session, turn])
            first = turn == 0
            at_s = float(starts[session] if first else thinking[session, turn])
            before = None if first else len(requests) - 1
            requests.append(TraceRequest(at_s, prompt, answer, turn_of=before))
            prompt += answer
    return requests
