"""Tokens of one request from several owners, late and twice: each index is delivered once, in order."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migration.token_span import TokenSpan, crc_of
from pd_serve.frontend.token_ledger import TokenLedger


class Logprobs(NamedTuple):
    """As vLLM's `LogprobsLists`: one row per token, and a field that may be absent."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    cumulative: list[int] | None = None


@dataclass
class Output:
    """The fields of vLLM's `EngineCoreOutput` that the ledger reads."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    new_logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Sent:
    """One output in transit, with its sender, epoch and the tokens of the sender's copy before."""

    source: str
    epoch: int
    before: Sequence[int]
    output: Output

    @property
    def span(self) -> TokenSpan:
        return self.epoch, len(self.before), crc_of(self.before)


def span(epoch: int, index: int) -> TokenSpan:
    """Of an output that follows the tokens 10, 11, 12 …"""
    return epoch, index, crc_of(range(10, 10 + index))


def out(*token_ids: int, finish: str | None = None) -> Output:
    return Output("r", list(token_ids), finish)


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


def chunks(draw: st.DrawFn, begin: int, end: int) -> list[tuple[int, int]]:
    """Cuts [begin, end) into steps of 1 to 3 tokens."""
    spans = []
    while begin < end:
        size = min(draw(st.integers(1, 3)), end - begin)
        spans.append((begin, begin + size))
        begin += size
    return spans


@st.composite
def journeys(draw: st.DrawFn) -> tuple[int, list[list[Sent]]]:
    """A request that 1 to 5 owners decode in turn: the number of its tokens, and every owner's outputs.

    Epochs rise from owner to owner; an instance may own the request more than once.
    """
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    owners: list[list[Sent]] = []
    begin = epoch = 0
    source = "a"
    for length in lengths:
        sent = []
        for first, end in chunks(draw, begin, begin + length):
            finish = "stop" if end == sum(lengths) else None
            sent.append(Sent(source, epoch, range(first), out(*range(first, end), finish=finish)))
        owners.append(sent)
        begin += length
        epoch += draw(st.integers(1, 3))
        source = draw(st.sampled_from([name for name in "abc" if name != source]))
    return begin, owners


def merge(draw: st.DrawFn, streams: list[list[Sent]]) -> list[Sent]:
    """Any interleaving that keeps each stream's order: one stream is one socket."""
    positions = [i for i, stream in enumerate(streams) for _ in stream]
    waiting = [list(stream) for stream in streams]
    return [waiting[i].pop(0) for i in draw(st.permutations(positions))]


def accept_all(ledger: TokenLedger, arrivals: list[Sent]) -> list[Output]:
    delivered = []
    for now, sent in enumerate(arrivals, start=1):
        # Each arrival is a message of its own: the ledger may cut it.
        output = replace(sent.output, new_token_ids=list(sent.output.new_token_ids))
        if ledger.extend(sent.source, sent.span, output, float(now)) is not None:
            delivered.append(output)
            continue
        delivered += ledger.accept(sent.source, sent.span, output, float(now)).ready
    return delivered


@given(st.data())
def test_extend_has_the_same_result_as_accept(data: st.DataObject) -> None:
    """`extend` takes only what `accept` would have taken, and does with it what that would have done."""
    _, streams = data.draw(journeys())
    long_way = TokenLedger("a")
    short_way = TokenLedger("a")
    for now, sent in enumerate(merge(data.draw, streams), start=1):
        outputs = [replace(sent.output, new_token_ids=list(sent.output.new_token_ids)) for _ in range(2)]
        accepted = long_way.accept(sent.source, sent.span, outputs[0], float(now))
        if short_way.extend(sent.source, sent.span, outputs[1], float(now)) is not None:
            assert accepted == ([outputs[0]], False, False)
        else:
            short_way.accept(sent.source, sent.span, outputs[1], float(now))
        assert long_way == short_way


@given(st.data())
def test_any_interleaving_of_owners_delivers_each_index_once_in_order(data: st.DataObject) -> None:
    """Tokens of a later owner may arrive before those of earlier owners."""
    num_tokens, owners = data.draw(journeys())
    arrivals = merge(data.draw, owners)
    ledger = TokenLedger("a")

    delivered = accept_all(ledger, arrivals)

    assert tokens(delivered) == ledger.token_ids == list(range(num_tokens))
    assert [bool(output.finish_reason) for output in delivered] == [False] * (len(delivered) - 1) + [True]
    assert ledger.finished
    assert not ledger.has_gap


@given(st.data())
def test_duplicates_are_not_delivered_again(data: st.DataObject) -> None:
    """A part of every owner's outputs comes a second time, at any later moment."""
    num_tokens, owners = data.draw(journeys())
    again = [[sent for sent in stream if data.draw(st.booleans())] for stream in owners]
    arrivals = merge(data.draw, owners + again)
    ledger = TokenLedger("a")

    delivered = accept_all(ledger, arrivals)

    assert tokens(delivered) == ledger.token_ids == list(range(num_tokens))
    assert sum(output.finish_reason is not None for output in delivered) == 1


@given(st.data())
def test_outputs_in_any_order_are_delivered_once_in_order(data: st.DataObject) -> None:
    """Even an owner's own outputs overtake each other, as over sockets that were made anew."""
    num_tokens, owners = data.draw(journeys())
    arrivals = data.draw(st.permutations([sent for stream in owners for sent in stream]))
    ledger = TokenLedger("a")

    assert tokens(accept_all(ledger, arrivals)) == list(range(num_tokens))
    assert ledger.finished


@given(st.data())
def test_delivered_tokens_are_a_prefix_of_the_generated_ones(data: st.DataObject) -> None:
    """Some outputs never arrive: later ones are held, none is skipped."""
    num_tokens, owners = data.draw(journeys())
    arrivals = [sent for sent in merge(data.draw, owners) if data.draw(st.booleans())]
    ledger = TokenLedger("a")

    delivered = accept_all(ledger, arrivals)

    assert tokens(delivered) == ledger.token_ids == list(range(len(ledger.token_ids)))
    assert not ledger.finished or len(ledger.token_ids) == num_tokens


@given(st.data())
def test_an_owner_that_decodes_after_a_take_over_adds_no_token(data: st.DataObject) -> None:
    """A dead owner was not dead: it decodes on, other tokens, while the next one continues.

    The request is recomputed from what had been delivered, and only the new owner's tokens follow.
    """
    num_before, num_after = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 5))
    spans = chunks(data.draw, 0, num_before) + chunks(data.draw, num_before, num_before + 5)
    ledger = TokenLedger("a")
    old = [Sent("a", 0, range(i), out(*range(i, end))) for i, end in spans if end <= num_before]
    other = [*range(num_before), *[900] * 5]
    zombie = [Sent("a", 0, other[:i], out(*other[i:end])) for i, end in spans if end > num_before]
    zombie.append(Sent("a", 0, other, out(finish="abort")))
    delivered = accept_all(ledger, old)
    epoch = ledger.take_over("b")
    total = num_before + num_after
    new = [
        Sent("b", epoch, range(i), out(*range(i, end), finish="stop" if end == total else None))
        for i, end in chunks(data.draw, num_before, total)
    ]

    delivered += accept_all(ledger, merge(data.draw, [new, zombie, old]))

    assert tokens(delivered) == ledger.token_ids == list(range(total))
    assert [output.finish_reason for output in delivered if output.finish_reason] == ["stop"]


def test_an_early_output_waits_for_those_before_it() -> None:
    """The destination's first token overtakes the source's last one."""
    ledger = TokenLedger("a")
    assert ledger.accept("a", span(0, 0), out(10), 1.0) == ([out(10)], False, False)

    assert ledger.accept("b", span(1, 2), out(12), 2.0) == ([], False, False)
    assert (ledger.owner, ledger.has_gap, ledger.has_token_of_owner) == ("b", True, False)

    assert ledger.accept("a", span(0, 1), out(11), 3.0) == ([out(11), out(12)], False, False)
    assert (ledger.token_ids, ledger.has_gap, ledger.has_token_of_owner) == ([10, 11, 12], False, True)


def test_an_early_end_waits_for_the_outputs_before_it() -> None:
    """The destination has finished the request before the source's last token is here."""
    ledger = TokenLedger("a")
    ledger.accept("b", span(1, 1), out(11, finish="length"), 1.0)
    assert not ledger.finished

    ready = ledger.accept("a", span(0, 0), out(10), 2.0).ready

    assert [output.finish_reason for output in ready] == [None, "length"]
    assert ledger.finished


def test_no_output_is_delivered_after_the_end() -> None:
    ledger = TokenLedger("a")
    ledger.accept("a", span(0, 0), out(10, finish="stop"), 1.0)

    assert ledger.accept("a", span(0, 1), out(11), 2.0).ready == []
    assert ledger.accept("a", span(0, 0), out(10, finish="stop"), 3.0).ready == []
    assert ledger.token_ids == [10]


def test_a_former_owner_that_decodes_on_is_reported() -> None:
    """Its token has an index that belongs to the present owner: it holds an outdated copy."""
    ledger = TokenLedger("a")
    ledger.accept("a", span(0, 0), out(10), 1.0)
    ledger.accept("b", span(1, 1), out(11), 2.0)

    assert ledger.accept("a", span(0, 1), out(99), 3.0) == ([], True, False)
    assert ledger.token_ids == [10, 11]


def test_a_former_owner_with_a_late_token_is_not_reported() -> None:
    ledger = TokenLedger("a")
    ledger.accept("b", span(1, 1), out(11), 1.0)

    assert ledger.accept("a", span(0, 0), out(10), 2.0).is_stale is False


def test_the_owner_is_not_reported_for_a_token_of_an_older_epoch() -> None:
    """The request has come back to an instance whose older tokens are in transit."""
    ledger = TokenLedger("a")
    ledger.accept("a", span(2, 1), out(11), 1.0)

    assert ledger.accept("a", span(0, 1), out(99), 2.0) == ([], False, False)


def test_of_two_owners_with_one_epoch_the_first_sender_stays() -> None:
    """A migration is taken back at the source while its destination has moved the request on."""
    ledger = TokenLedger("a")
    ledger.accept("b", span(2, 0), out(10), 1.0)

    assert ledger.accept("c", span(2, 1), out(99), 2.0) == ([], True, False)
    assert (ledger.owner, ledger.token_ids) == ("b", [10])


def test_take_over_continues_from_what_was_delivered_above_all_former_epochs() -> None:
    """What had arrived early from the dead owner is forgotten: its predecessor's token will not come."""
    ledger = TokenLedger("a")
    ledger.accept("a", span(0, 0), out(10), 1.0)
    ledger.accept("b", span(7, 2), out(12), 2.0)

    epoch = ledger.take_over("c")

    assert epoch > 7
    assert (ledger.owner, ledger.epoch, ledger.has_gap, ledger.has_token_of_owner) == (
        "c",
        epoch,
        False,
        False,
    )
    assert ledger.accept("c", span(epoch, 1), out(21), 3.0) == ([out(21)], False, False)
    assert ledger.accept("b", span(7, 3), out(13), 4.0) == ([], True, False)
    assert ledger.token_ids == [10, 21]


def test_the_new_owner_may_be_the_instance_that_held_an_older_copy() -> None:
    """Its tokens under the old epoch do not count, those under the new one do."""
    ledger = TokenLedger("a")
    ledger.accept("a", span(0, 0), out(10), 1.0)
    epoch = ledger.take_over("a")

    assert ledger.accept("a", span(0, 1), out(98), 2.0) == ([], False, False)
    assert ledger.accept("a", span(epoch, 1), out(11), 3.0) == ([out(11)], False, False)


def test_a_former_owner_s_end_does_not_end_a_continued_request() -> None:
    """An outdated copy is aborted after the first token of a later owner."""
    ledger = TokenLedger("a")
    ledger.accept("a", span(0, 0), out(10, 11, 12), 1.0)
    ledger.accept("b", span(1, 3), out(13), 2.0)

    assert ledger.accept("a", span(0, 2), out(finish="abort"), 3.0).ready == []
    assert not ledger.finished


def test_a_former_owner_s_early_end_does_not_end_a_continued_request() -> None:
    """It waited for an earlier token; then a token of the owner that has continued came."""
    ledger = TokenLedger("a")
    ledger.accept("a", span(0, 1), out(11, finish="stop"), 1.0)
    ledger.accept("b", span(1, 2), out(12), 2.0)

    ready = ledger.accept("a", span(0, 0), out(10), 3.0).ready

    assert (tokens(ready), ledger.finished) == ([10, 11, 12], False)


def test_a_former_owner_s_output_counts_up_to_where_the_present_one_began() -> None:
    """One step has computed tokens before and after the move."""
    ledger = TokenLedger("a")
    ledger.accept("b", span(1, 2), out(12), 1.0)
    logprobs = Logprobs([[10], [11], [99]], [[-0.1], [-0.2], [-0.3]])

    ready = ledger.accept("a", span(0, 0), Output("r", [10, 11, 99], None, logprobs), 2.0).ready

    assert ready == [Output("r", [10, 11], None, Logprobs([[10], [11]], [[-0.1], [-0.2]])), out(12)]


@pytest.mark.parametrize(("index", "left"), [(0, [12, 13]), (1, [12, 13]), (2, [12, 13])])
def test_the_new_part_of_a_partly_delivered_output_is_delivered(index: int, left: list[int]) -> None:
    ledger = TokenLedger("a")
    ledger.accept("a", span(0, 0), out(10, 11), 1.0)

    ready, is_stale, _ = ledger.accept("a", span(0, index), out(*range(10 + index, 14)), 2.0)

    assert (tokens(ready), is_stale) == (left, False)
    assert ledger.token_ids == [10, 11, 12, 13]


def test_logprobs_are_cut_with_the_tokens_that_they_belong_to() -> None:
    ledger = TokenLedger("a")
    ledger.accept("a", span(0, 0), out(10, 11), 1.0)
    logprobs = Logprobs([[11, 1], [12, 2], [13, 3]], [[-0.1], [-0.2], [-0.3]])

    ready = ledger.accept("a", span(0, 1), Output("r", [11, 12, 13], "stop", logprobs), 2.0).ready

    assert ready == [Output("r", [12, 13], "stop", Logprobs([[12, 2], [13, 3]], [[-0.2], [-0.3]]))]


def test_a_duplicate_output_that_ends_the_request_is_delivered_without_its_tokens() -> None:
    """The end came with a token that had been delivered before."""
    ledger = TokenLedger("a")
    ledger.accept("a", span(0, 0), out(10), 1.0)

    assert ledger.accept("a", span(0, 0), out(10, finish="stop"), 2.0).ready == [out(finish="stop")]
    assert ledger.finished


def test_the_last_gap_is_the_time_between_the_tokens_of_two_owners() -> None:
    ledger = TokenLedger("a")
    ledger.accept("a", span(0, 0), out(10), 1.0)
    ledger.accept("a", span(0, 1), out(11), 5.0)
    assert ledger.last_gap_s == 0.0

    ledger.accept("b", span(1, 2), out(12), 5.5)
    ledger.accept("b", span(1, 3), out(13), 9.0)
    assert (ledger.last_gap_s, ledger.num_moves) == (0.5, 1)

    ledger.accept("a", span(2, 4), out(14), 9.25)
    assert (ledger.last_gap_s, ledger.num_moves) == (0.25, 2)


def test_the_last_gap_ends_with_the_delivery_of_the_new_owner_s_token() -> None:
    """It arrived before the former owner's last one, with which it is delivered."""
    ledger = TokenLedger("a")
    ledger.accept("a", span(0, 0), out(10), 1.0)
    ledger.accept("b", span(1, 2), out(12), 2.0)
    ledger.accept("a", span(0, 1), out(11), 4.0)

    assert ledger.last_gap_s == 0.0


def test_a_request_that_is_recomputed_before_its_first_token_has_no_gap() -> None:
    ledger = TokenLedger("a")
    epoch = ledger.take_over("b")
    ledger.accept("b", span(epoch, 0), out(10), 3.0)

    assert ledger.last_gap_s == 0.0


def test_the_longest_gap_is_between_any_two_deliveries() -> None:
    """Also where the owner changes, and when nothing but the end comes."""
    ledger = TokenLedger("a")
    ledger.accept("a", span(0, 0), out(10), 10.0)
    assert ledger.longest_gap_s == 0.0
    assert ledger.extend("a", span(0, 1), out(11), 10.5) == 10.0
    assert ledger.longest_gap_s == 0.5
    assert ledger.extend("a", span(0, 2), out(12), 10.7) == 10.5
    assert ledger.longest_gap_s == 0.5
    ledger.accept("b", span(1, 3), out(13), 13.0)
    assert ledger.longest_gap_s == ledger.last_gap_s == pytest.approx(2.3)


def test_delivered_epoch_is_the_epoch_of_an_owner_whose_token_was_delivered() -> None:
    ledger = TokenLedger("a")
    assert ledger.delivered_epoch == -1
    ledger.accept("b", span(1, 1), out(11), 10.0)  # early: the token of the former owner has not come
    assert ledger.delivered_epoch == -1
    ledger.accept("a", span(0, 0), out(10), 11.0)
    assert ledger.delivered_epoch == 1
    ledger.take_over("c")
    assert ledger.delivered_epoch == -1


def test_a_copy_with_another_text_is_a_fork() -> None:
    """The source took the request back, though the destination had continued it with other tokens."""
    ledger = TokenLedger("a")
    ledger.accept("a", span(0, 0), out(10), 1.0)
    ledger.accept("b", span(1, 1), out(11, 12, 13), 2.0)

    assert ledger.accept("a", span(2, 1), out(21), 3.0) == ([], False, True)

    epoch = ledger.take_over("c")
    assert ledger.accept("b", span(1, 4), out(14), 4.0) == ([], True, False)
    assert ledger.accept("c", span(epoch, 4), out(24), 5.0) == ([out(24)], False, False)
    assert ledger.token_ids == [10, 11, 12, 13, 24]


def test_a_fork_is_found_by_the_crc_when_the_tokens_that_differ_are_lost() -> None:
    ledger = TokenLedger("a")
    ledger.accept("a", span(0, 0), out(10), 1.0)
    ledger.accept("b", span(1, 1), out(11), 2.0)
    assert ledger.accept("a", (2, 2, crc_of([10, 21])), out(22), 3.0).is_fork


def test_tokens_of_a_former_owner_with_another_text_fill_no_gap() -> None:
    """Of two copies that continued the request, the lower epoch's tokens come when the higher is known."""
    ledger = TokenLedger("a")
    ledger.accept("a", span(0, 0), out(10), 1.0)
    assert ledger.accept("a", (2, 2, crc_of([10, 21])), out(22), 2.0) == ([], False, False)
    ready, _, is_fork = ledger.accept("b", span(1, 1), out(11), 3.0)
    assert (ready, is_fork) == ([out(11)], True)


def test_a_copy_that_ended_before_the_last_delivered_token_is_a_fork() -> None:
    ledger = TokenLedger("a")
    ledger.accept("b", span(1, 0), out(10, 11, 12), 1.0)
    assert ledger.accept("a", span(2, 1), out(finish="stop"), 2.0) == ([], False, True)


@given(st.data())
def test_two_copies_that_sample_differently_are_never_mixed(data: st.DataObject) -> None:
    """Source and destination both continue a request, in any order, with losses and duplicates."""
    num_before, num_after = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 5))
    texts = [[*range(num_before), *(100 * copy + i for i in range(num_after))] for copy in (1, 2, 3)]
    copies = [
        [
            Sent("ab"[copy], copy + 1, texts[copy][:i], out(*texts[copy][i:end]))
            for i, end in chunks(data.draw, num_before, num_before + num_after)
        ]
        for copy in (0, 1)
    ]
    begin = [Sent("a", 0, range(i), out(*range(i, end))) for i, end in chunks(data.draw, 0, num_before)]
    arrivals = data.draw(st.lists(st.sampled_from([*begin, *copies[0], *copies[1]]), max_size=30))
    ledger = TokenLedger("a")
    for now, sent in enumerate(arrivals, start=1):
        output = replace(sent.output, new_token_ids=list(sent.output.new_token_ids))
        if ledger.extend(sent.source, sent.span, output, float(now)) is not None:
            continue
        if ledger.accept(sent.source, sent.span, output, float(now)).is_fork:
            recomputed = [*ledger.token_ids, *texts[2][num_before:]]
            span = (ledger.take_over("c"), len(ledger.token_ids), ledger.crc)
            ledger.accept("c", span, out(*texts[2][num_before:]), float(now))
            assert ledger.token_ids == recomputed
            break
    assert any(ledger.token_ids == text[: len(ledger.token_ids)] for text in texts) or ledger.owner == "c"
    assert ledger.crc == crc_of(ledger.token_ids)
