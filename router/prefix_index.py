"""Which instance has the KV blocks of which prompts, as the instances report it."""

import time
from collections.abc import Callable, Iterable, Sequence, Set

#: Time after which blocks are not expected any more, in seconds; and the number expected of one instance.
EXPECTED_S = 30.0
MAX_EXPECTED = 20_000


class PrefixIndex:
    """The keys of the blocks in the prefix caches of all instances; see `migration.cached_keys`.

    It is a hint: reports come late, and two blocks may have the same key. Each API server has its own.

    Args:
        clock: Seconds.

    Attributes:
        is_used: A policy needs it; otherwise it stays empty.
        key_tokens: Tokens per key.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_used = False
        self.key_tokens = 0
        self._clock = clock
        self._held: dict[str, set[int]] = {}
        self._expected: dict[str, dict[int, float]] = {}  # the latest ones last

    # ---- reports

    def add(self, instance_id: str, keys: Iterable[int], most: int) -> None:
        """An instance has blocks with these keys; at most `most` in all, of which others are forgotten."""
        held = self._held.setdefault(instance_id, set())
        held.update(keys)
        while len(held) > most:
            held.pop()

    def discard(self, instance_id: str, keys: Iterable[int]) -> None:
        """An instance has lost the blocks with these keys."""
        self._held.get(instance_id, set()).difference_update(keys)
        if expected := self._expected.get(instance_id):
            for key in keys:
                expected.pop(key, None)

    def clear(self, instance_id: str) -> None:
        """Forgets what an instance has."""
        self._held.pop(instance_id, None)

    def remove(self, instance_id: str) -> None:
        """An instance is gone."""
        self._held.pop(instance_id, None)
        self._expected.pop(instance_id, None)

    def expect(self, instance_id: str, keys: Sequence[int]) -> None:
        """A request with these keys has been sent to an instance, which will have their blocks soon."""
        expected = self._expected.setdefault(instance_id, {})
        until = self._clock() + EXPECTED_S
        for key in keys:
            expected.pop(key, None)
            expected[key] = until
        while expected and (len(expected) > MAX_EXPECTED or expected[next(iter(expected))] <= self._clock()):
            del expected[next(iter(expected))]

    # ---- questions

    def keys(self, instance_id: str) -> Set[int]:
        """What an instance has."""
        return self._held.get(instance_id, frozenset())

    def held_tokens(self, instance_id: str, keys: Sequence[int], *, soon: bool = False) -> int:
        """Tokens at the beginning of a prompt, given by its keys, whose blocks an instance has.

        Args:
            soon: Count the blocks that are expected there, too.
        """
        held = self._held.get(instance_id, ())
        expected = self._expected.get(instance_id, {}) if soon else {}
        now = self._clock() if expected else 0.0
        number = 0
        for key in keys:
            if key not in held and expected.get(key, 0.0) <= now:
                break
            number += 1
        return number * self.key_tokens
