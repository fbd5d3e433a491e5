"""What is tried with the two instances of a case."""

import itertools
import statistics
from typing import Any

from tests.gpu.pair import Output, Pair

#: Logprobs of equal tokens may differ by so much: a batch of another size is computed in another order.
LOGPROB_TOLERANCE = 1e-3

#: Tokens between two moves whose gaps are measured, without the first ones: they belong to a new batch.
TOKENS_BETWEEN, NEW_BATCH = 24, 4


class WrongOutputError(Exception):
    """A moved request has other outputs than one that stays, or a negative control has the same."""


class Trials:
    """The trials of one case.

    Args:
        tokens: Output tokens of a request.
        prompt_tokens: Of the prompts whose outputs are compared: longer than a window, several chunks.
    """

    def __init__(self, pair: Pair, *, tokens: int, prompt_tokens: int) -> None:
        self._pair = pair
        self._tokens = tokens
        self._prompt_tokens = prompt_tokens
        self._serial = itertools.count(1)

    async def outputs(self, *, seeded: bool) -> dict[str, Any]:
        """There and back, a hand-off during the prompt, and a copy that lacks a block."""
        greedy = {"temperature": 0.0, "logprobs": 1, "max_tokens": self._tokens}
        found = {"moved there and back, greedy": await self._there_and_back(greedy)}
        if seeded:
            sampled = greedy | {"temperature": 1.0, "seed": 1234, "presence_penalty": 0.5}
            found["moved there and back, seeded"] = await self._there_and_back(sampled)
        found["handed off during its prompt"] = await self._hand_off(greedy)
        found["without one block"] = await self._without_a_block(greedy)
        return found

    async def downtime(self, lengths: tuple[int, ...], moves: int) -> dict[str, Any]:
        """Gaps between two tokens of one request, in milliseconds: in place, across a move, at a hand-off."""
        await self._gaps(lengths[0], 2)  # warm-up
        return {f"{length} tokens": await self._gaps(length, moves) for length in lengths}

    # ----

    async def _there_and_back(self, params: dict[str, Any]) -> dict[str, Any]:
        prompt = self._prompt()
        stays = await self._stays(prompt, params)
        moves = await self._pair.add("a", self._name(), prompt, params)
        records = []
        for source in "ab":
            await self._pair.tokens(moves, len(moves.tokens) + 8)
            records.append(await self._pair.call(source, "migrate", self._last_name))
        await self._pair.finish(moves)
        if (path := [name for name, _ in itertools.groupby(moves.instances)]) != ["a", "b", "a"]:
            raise WrongOutputError(f"the tokens came from {path}")
        return {"moves": records, "logprob_difference": _compare(moves, stays)}

    async def _hand_off(self, params: dict[str, Any]) -> dict[str, Any]:
        prompt = self._prompt()
        stays = await self._stays(prompt, params)
        moves = await self._pair.finish(await self._pair.add("a", self._name(), prompt, params, handoff=True))
        if moves.instances[-1] != "b":
            raise WrongOutputError("the request was not handed off")
        return {"tokens_at_source": moves.instances.count("a"), "logprob_difference": _compare(moves, stays)}

    async def _without_a_block(self, params: dict[str, Any]) -> dict[str, Any]:
        """A negative control: were the copy not needed, the other trials would show nothing."""
        prompt = self._prompt()
        stays = await self._stays(prompt, params)
        await self._pair.both("leave_out", True)
        moves = await self._pair.add("a", self._name(), prompt, params)
        await self._pair.tokens(moves, 8)
        await self._pair.call("a", "migrate", self._last_name)
        await self._pair.finish(moves)
        await self._pair.both("leave_out", False)
        try:
            _compare(moves, stays)
        except WrongOutputError:
            return {"differs": True}
        raise WrongOutputError("without one of its blocks a moved request has the same output")

    async def _gaps(self, length: int, moves: int) -> dict[str, Any]:
        params = {"temperature": 0.0, "max_tokens": (moves + 1) * TOKENS_BETWEEN * 2}
        handed = await self._pair.add(
            "a", self._name(), self._prompt(length), params | {"max_tokens": TOKENS_BETWEEN}, handoff=True
        )
        (handoff,), _ = _gaps_ms(await self._pair.finish(handed))
        output = await self._pair.add("a", self._name(), self._prompt(length), params)
        name, records = self._last_name, []
        for index in range(moves):
            await self._pair.tokens(output, len(output.tokens) + TOKENS_BETWEEN)
            records.append(await self._pair.call("ab"[index % 2], "migrate", name))
        await self._pair.finish(output)
        across, in_place = _gaps_ms(output)
        itl, downtime = statistics.median(in_place), statistics.median(across)
        return {
            "itl_ms": round(itl, 3),
            "downtime_ms": round(downtime, 3),
            "downtime_over_itl": round(downtime / itl, 2),
            "downtimes_ms": [round(gap, 3) for gap in across],
            "handoff_gap_ms": round(handoff, 3),
            "tokens_before_handoff": handed.instances.count("a"),
            "bytes_copied": [record["bytes_copied"] for record in records],
            "suspended_ms": [round(record["suspended_ms"], 3) for record in records],
        }

    async def _stays(self, prompt: list[int], params: dict[str, Any]) -> Output:
        """The output of a request that does not move; caches are as they were before."""
        await self._pair.rest()
        await self._pair.both("forget")
        output = await self._pair.finish(await self._pair.add("a", self._name(), prompt, params))
        await self._pair.rest()
        await self._pair.both("forget")
        return output

    def _name(self) -> str:
        self._last_name = f"request-{next(self._serial)}"
        return self._last_name

    def _prompt(self, length: int = 0) -> list[int]:
        """Another one at each call: blocks of an earlier one hold other contents."""
        seed = next(self._serial)
        return [(seed * i * i + 3 * i + seed) % 90 + 33 for i in range(length or self._prompt_tokens)]


def _compare(moves: Output, stays: Output) -> float:
    """The greatest difference of two logprobs. Raises: WrongOutputError."""
    if moves.tokens != stays.tokens:
        pairs = enumerate(zip(moves.tokens, stays.tokens, strict=False))
        first = next((index for index, (ours, theirs) in pairs if ours != theirs), "the end")
        at = moves.instances[first - 1 : first + 1] if isinstance(first, int) else []
        raise WrongOutputError(f"the tokens differ from token {first} on; sent by {at}")
    ours, theirs = (list(itertools.chain.from_iterable(output.logprobs)) for output in (moves, stays))
    difference = max((abs(a - b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    if difference > LOGPROB_TOLERANCE:
        raise WrongOutputError(f"logprobs differ by {difference}")
    return difference


def _gaps_ms(output: Output) -> tuple[list[float], list[float]]:
    """Gaps across moves, and those in place without the first ones after a move."""
    across, in_place, since = [], [], 0
    for index in range(1, len(output.times)):
        gap = (output.times[index] - output.times[index - 1]) * 1e3
        moved = output.instances[index] != output.instances[index - 1]
        since = 0 if moved else since + 1
        if moved:
            across.append(gap)
        elif since > NEW_BATCH:
            in_place.append(gap)
    return across, in_place
