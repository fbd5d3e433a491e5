"""Where the last turn of a session was computed, as a hint of what a prefix cache has of its next one."""

from collections import OrderedDict

#: Maximum number of sessions that are remembered: the latest ones.
MAX_SESSIONS = 20_000


class SessionHints:
    """The instance of each session's last prompt, and its length. Each API server has its own."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, tuple[str, int]] = OrderedDict()

    def note(self, session: str, instance_id: str, prompt_tokens: int) -> None:
        """A prompt of a session has been sent to an instance."""
        self._last[session] = instance_id, prompt_tokens
        self._last.move_to_end(session)
        if len(self._last) > MAX_SESSIONS:
            self._last.popitem(last=False)

    def cached_tokens(self, session: str, instance_id: str, prompt_tokens: int) -> int:
        """Tokens of a session's next prompt that an instance probably has: those of its last prompt."""
        last_id, tokens = self._last.get(session, ("", 0))
        return min(tokens, prompt_tokens - 1) if last_id == instance_id else 0
