"""Every token index exactly once, in order, whoever sends it.

Tokens of one request may come from several owners over several sockets, late or twice. Each output
carries its owner's epoch and the index of its first token.
"""

from dataclasses import dataclass, field
from typing import Any

from pd_serve.comm.outputs import RequestOutput


@dataclass
class TokenLedger:
    """One request's tokens, as its API server has taken them.

    Attributes:
        token_ids: Delivered output tokens; their number is the next index.
        epoch: Highest ownership epoch seen.
        owner: The instance that spoke with it.
        finished: The last output has been delivered.
        last_token_at: Time of the last delivery, in seconds.
        longest_gap_s: Between any two deliveries.
        last_gap_s: Between the last token of the former owner and the first of the present one.
        num_moves: Changes of owner.
    """

    owner: str
    epoch: int = 0
    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
    last_token_at: float = 0.0
    longest_gap_s: float = 0.0
    last_gap_s: float = 0.0
    num_moves: int = 0
    _epoch_begin: int = 0
    _early: dict[int, tuple[int, RequestOutput]] = field(default_factory=dict)

    def extend(self, source: str, epoch: int, index: int, output: RequestOutput, now: float) -> float | None:
        """Takes what nearly every output is: the next one, from the owner, not its first and not the last.

        Returns: the time of the last delivery before; None if nothing has happened, and it is for `accept`.
        """
        token_ids = self.token_ids
        if (
            epoch != self.epoch
            or source != self.owner
            or index != len(token_ids)
            or index == self._epoch_begin
            or self._early
            or self.finished
            or output.finish_reason is not None
        ):
            return None
        token_ids += output.new_token_ids
        before, self.last_token_at = self.last_token_at, now
        if now - before > self.longest_gap_s:
            self.longest_gap_s = now - before
        return before

    def accept(
        self, source: str, epoch: int, index: int, output: RequestOutput, now: float
    ) -> tuple[list[RequestOutput], bool]:
        """Takes one output of vLLM's (`EngineCoreOutput`), whose first new token has this index.

        Returns:
            The outputs that can be delivered now, in order (often this one, none if it is early or known);
            and whether its sender is not the owner any more, and should be told to end the request.
        """
        if epoch > self.epoch:
            if source != self.owner:
                self.num_moves += 1
            self.owner, self.epoch, self._epoch_begin = source, epoch, index
            self._early = {i: e for i, e in self._early.items() if i < index or e[0] >= epoch}
        elif source != self.owner and epoch == self.epoch:
            # A request taken back outranks its destination, but not where that one has moved it on to.
            # Of two owners with one epoch the first to be heard is the owner.
            return [], True
        elif epoch < self.epoch and index >= self._epoch_begin:
            return [], source != self.owner
        self._early[index] = (epoch, output)
        deliver = []
        while self._early and not self.finished:
            first = min(self._early)
            if first > len(self.token_ids):
                break
            said_under, ready = self._early.pop(first)
            if said_under < self.epoch:
                # The present owner has continued: neither what follows its first token nor the end of
                # the request is for a former owner to say.
                _keep(ready, 0, max(self._epoch_begin - first, 0))
                ready.finish_reason = None
            if self._take(first, ready, now):
                deliver.append(ready)
        return deliver, False

    @property
    def owner_has_spoken(self) -> bool:
        """Whether a token of the present owner has been delivered."""
        return len(self.token_ids) > self._epoch_begin

    @property
    def heard_epoch(self) -> int:
        """Of the last owner of whom a token has been delivered, if it is the present one; else -1."""
        return self.epoch if self.owner_has_spoken else -1

    @property
    def has_gap(self) -> bool:
        """Whether the present owner has been heard, but not all that its predecessors said before."""
        return len(self.token_ids) < self._epoch_begin

    def take_over(self, owner: str) -> int:
        """The former owner died: `owner` continues from what has been delivered. Returns its epoch."""
        # Far above anything that migrations of the lost owner may have handed out.
        self.epoch += 1000
        self._epoch_begin = len(self.token_ids)
        self._early.clear()
        self.owner = owner
        self.num_moves += 1
        return self.epoch

    def _take(self, index: int, output: RequestOutput, now: float) -> bool:
        """Adds an output's new tokens, cutting those that are known. False if nothing is left of it."""
        known = len(self.token_ids) - index
        if known > 0 and known >= len(output.new_token_ids) and output.finish_reason is None:
            return False
        if known > 0:
            _keep(output, known, len(output.new_token_ids))
        if self.last_token_at:
            gap_s = now - self.last_token_at
            self.longest_gap_s = max(self.longest_gap_s, gap_s)
            if self.num_moves and index == self._epoch_begin:
                self.last_gap_s = gap_s
        self.token_ids.extend(output.new_token_ids)
        self.last_token_at = now
        self.finished = output.finish_reason is not None
        return True


def _keep(output: Any, begin: int, end: int) -> None:
    """Leaves of an output only its new tokens [begin, end), and what belongs to them."""
    if begin == 0 and end >= len(output.new_token_ids):
        return
    output.new_token_ids = output.new_token_ids[begin:end]
    if output.new_logprobs is not None:
        output.new_logprobs = type(output.new_logprobs)(
            *(part[begin:end] if hasattr(part, "__getitem__") else part for part in output.new_logprobs)
        )
