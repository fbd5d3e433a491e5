"""Metrics by API key, under its name or the beginning of its hash: never the key itself."""

from collections.abc import Sequence

from pd_serve.observe.metrics import (
    KEY_OUTPUT_TOKENS,
    KEY_PROMPT_TOKENS,
    KEY_REFUSED,
    KEY_REQUESTS,
    KEY_WAITING,
)
from pd_serve.observe.recorder import Observer
from pd_serve.observe.timeline import Timeline

#: Keys with series of their own; further ones are counted together under `OTHERS`.
MAX_KEYS = 200
OTHERS = "others"


class KeyMetrics(Observer):
    """Counts in the registry of the process. Without keys there are no series.

    Args:
        names: By account. Keys of the same name are counted together.
    """

    def __init__(self, names: Sequence[str]) -> None:
        shown = [*dict.fromkeys(names)][:MAX_KEYS]
        self._names = [name if name in shown else OTHERS for name in names]
        for name in self._names:
            for metric in (KEY_REQUESTS, KEY_PROMPT_TOKENS, KEY_OUTPUT_TOKENS, KEY_REFUSED, KEY_WAITING):
                metric.labels(name)

    def refused(self, account: int) -> None:
        """A request of an account gets 429."""
        if account < len(self._names):
            KEY_REFUSED.labels(self._names[account]).inc()

    def issued(self, request: Timeline) -> None:
        self._wait(request, 1)

    def first_token(self, request: Timeline) -> None:
        self._wait(request, -1)

    def ended(self, request: Timeline) -> None:
        if request.first_token_at is None:
            self._wait(request, -1)
        if request.account < len(self._names):
            name = self._names[request.account]
            KEY_REQUESTS.labels(name).inc()
            KEY_PROMPT_TOKENS.labels(name).inc(request.prompt_tokens)
            KEY_OUTPUT_TOKENS.labels(name).inc(request.output_tokens)

    def _wait(self, request: Timeline, change: int) -> None:
        if request.account < len(self._names):
            KEY_WAITING.labels(self._names[request.account]).inc(change)
