"""Delivers every token index exactly once and in order, from any instance.

Tokens of one request may come from several owners on several sockets, late or twice. Each output has the
epoch of its sender, the index of its first token, and the CRC of the sender's tokens before. So what is
delivered is one copy's text: two copies that continued a request from the same token may have sampled
different ones, and a client that got tokens of both would have a text that no engine has computed.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from migration.token_span import TokenSpan, crc_of
from pd_serve.comm.outputs import RequestOutput


class Accepted(NamedTuple):
    """What becomes of an output.

    Attributes:
        ready: The outputs to deliver now, in order: often this one; none if it is early or a duplicate.
        is_stale: Its sender is a former owner, whose copy of the request has to be ended.
        is_fork: The present owner does not continue the delivered tokens. The request has to be recomputed
            from them (`take_over`), and the owner's copy to be ended.
    """

    ready: list[RequestOutput]
    is_stale: bool = False
    is_fork: bool = False


@dataclass
class TokenLedger:
    """The tokens of one request that have been delivered, and its owner.

    Attributes:
        owner: The instance that sent the highest epoch.
        epoch: Highest epoch received.
        token_ids: Delivered output tokens; their number is the next index.
        crc: `crc_of` these.
        finished: The last output has been delivered.
        last_token_at: Time of the last delivery, in seconds.
        longest_gap_s: Longest time between two deliveries.
        last_gap_s: Time between the last token of the former owner and the first of the present one.
        num_moves: Number of changes of the owner.
        recomputed_epoch: Epoch of the last recompute. Copies of a lower epoch are outdated.
    """

    owner: str
    epoch: int = 0
    token_ids: list[int] = field(default_factory=list)
    crc: int = 0
    finished: bool = False
    last_token_at: float = 0.0
    longest_gap_s: float = 0.0
    last_gap_s: float = 0.0
    num_moves: int = 0
    recomputed_epoch: int = 0
    _epoch_begin: int = 0
    _early: dict[int, tuple[TokenSpan, RequestOutput]] = field(default_factory=dict)

    def extend(self, source: str, span: TokenSpan, output: RequestOutput, now: float) -> float | None:
        """Fast path of `accept` for the owner's next output, if it is neither its first nor its last.

        Returns:
            Time of the delivery before; None if nothing was done and `accept` has to take the output.
        """
        epoch, index, crc = span
        token_ids = self.token_ids
        if (
            epoch != self.epoch
            or source != self.owner
            or index != len(token_ids)
            or crc != self.crc
            or index == self._epoch_begin
            or self._early
            or self.finished
            or output.finish_reason is not None
        ):
            return None
        token_ids += output.new_token_ids
        self.crc = crc_of(output.new_token_ids, crc)
        before, self.last_token_at = self.last_token_at, now
        if now - before > self.longest_gap_s:
            self.longest_gap_s = now - before
        return before

    def accept(self, source: str, span: TokenSpan, output: RequestOutput, now: float) -> Accepted:
        """Takes one output (vLLM's `EngineCoreOutput`)."""
        epoch, index, _ = span
        if epoch > self.epoch:
            if source != self.owner:
                self.num_moves += 1
            self.owner, self.epoch, self._epoch_begin = source, epoch, index
            self._early = {i: e for i, e in self._early.items() if i < index or e[0][0] >= epoch}
        elif source != self.owner and epoch == self.epoch:
            # A source that takes a request back has a higher epoch than its destination, but possibly the
            # same epoch as an instance to which the destination moved it on. The first sender is the owner.
            return Accepted([], is_stale=True)
        elif epoch < self.epoch and index >= self._epoch_begin:
            return Accepted([], is_stale=source != self.owner)
        known = self._early.get(index)
        if known is None or known[0][0] <= epoch:
            self._early[index] = (span, output)
        deliver: list[RequestOutput] = []
        while self._early and not self.finished:
            first = min(self._early)
            if first > len(self.token_ids):
                break
            (sent_epoch, _, crc), ready = self._early.pop(first)
            if not self._continues(first, crc, ready):
                if sent_epoch == self.epoch:
                    return Accepted(deliver, is_fork=True)
                continue
            if sent_epoch < self.epoch:
                # The present owner has continued: drop the former owner's tokens after the first token of
                # the present one, and its end of the request.
                _keep(ready, 0, max(self._epoch_begin - first, 0))
                ready.finish_reason = None
            if self._take(first, ready, now):
                deliver.append(ready)
        return Accepted(deliver)

    @property
    def has_token_of_owner(self) -> bool:
        """Whether a token of the present owner has been delivered."""
        return len(self.token_ids) > self._epoch_begin

    @property
    def delivered_epoch(self) -> int:
        """The epoch if a token of the present owner has been delivered, otherwise -1."""
        return self.epoch if self.has_token_of_owner else -1

    @property
    def has_gap(self) -> bool:
        """Whether tokens of former owners, before the first token of the present owner, have not arrived."""
        return len(self.token_ids) < self._epoch_begin

    def take_over(self, owner: str) -> int:
        """Makes `owner` continue after the delivered tokens, as the former owner died. Returns its epoch."""
        # Higher than every epoch that migrations of the lost owner may have reached.
        self.epoch += 1000
        self.recomputed_epoch = self.epoch
        self._epoch_begin = len(self.token_ids)
        self._early.clear()
        self.owner = owner
        self.num_moves += 1
        return self.epoch

    def _continues(self, index: int, crc: int, output: RequestOutput) -> bool:
        """Whether an output that begins at a delivered token, or right after the last, has the same text."""
        known = len(self.token_ids) - index
        if known <= len(output.new_token_ids):
            return crc_of(output.new_token_ids[:known], crc) == self.crc
        has_ended_before = output.finish_reason is not None
        end = index + len(output.new_token_ids)
        return not has_ended_before and crc_of(output.new_token_ids, crc) == crc_of(self.token_ids[:end])

    def _take(self, index: int, output: RequestOutput, now: float) -> bool:
        """Adds an output's tokens without those delivered before. Returns False if none is left."""
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
        self.crc = crc_of(output.new_token_ids, self.crc)
        self.last_token_at = now
        self.finished = output.finish_reason is not None
        return True


def _keep(output: Any, begin: int, end: int) -> None:
    """Keeps of an output only the new tokens [begin, end) and their logprobs."""
    if begin == 0 and end >= len(output.new_token_ids):
        return
    output.new_token_ids = output.new_token_ids[begin:end]
    if output.new_logprobs is not None:
        output.new_logprobs = type(output.new_logprobs)(
            *(part[begin:end] if hasattr(part, "__getitem__") else part for part in output.new_logprobs)
        )
