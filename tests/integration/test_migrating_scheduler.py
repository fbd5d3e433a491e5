"""The scheduler mixin over vLLM's own schedulers; no model is executed.

Every test ends with both nodes at rest: no request, no block, no slot held, integrity clean.
"""

from collections.abc import Callable, Iterator

import pytest
from vllm.v1.request import RequestStatus

from migration.engine_rules import SLACK_BLOCKS
from migration.messages import BlockRun, KvPart
from migration.vllm_engine.request_loader import queue_for_recompute
from migration.vllm_engine.scheduler_integrity import check_scheduler
from pd_serve.errors import DestinationRefusedError, SourceGoneError
from tests.integration.scheduler_lab import KINDS, Kind, Move, Node, migrate, nodes_at_rest, undisturbed

pytestmark = pytest.mark.integration

BLOCK = 32
PROMPT = list(range(200, 300))  # three full blocks and a bit


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(params=[kind for kind in KINDS if kind.overlapped], ids=str)
def overlapped(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def make() -> Iterator[Callable[..., Node]]:
    with nodes_at_rest() as make:
        yield make


def abort(node: Node, request_id: str) -> None:
    node.call(node.scheduler.finish_requests, request_id, RequestStatus.FINISHED_ABORTED)


class TestStages:
    def test_a_stage_is_the_full_blocks_behind_the_steps_in_flight(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        node = make(kind, max_batched_tokens=64)
        request = node.add("r", list(range(400)), max_tokens=3)
        node.steps(3)  # 192 tokens scheduled; overlapped, the last 64 of them are in flight
        assert request.num_computed_tokens == 192
        assert request.num_in_flight_tokens == (64 if kind.overlapped else 0)
        part = node.wait_for_stage(request).part
        full = 4 if kind.overlapped else 6
        assert part == KvPart(full * BLOCK, [BlockRun(0, node.block_ids("r")[:full])])
        answer = node.wait_for_stage(request, part.end)
        assert not answer
        node.step()
        assert answer.part.runs == [BlockRun(full, node.block_ids("r")[full : full + 2])]

    def test_a_prompt_is_never_suspended_before_its_first_token(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        node = make(kind, max_batched_tokens=64)
        request = node.add("r", list(range(150)), max_tokens=10)
        node.step()
        tokens_done = 0
        while True:
            answer = node.wait_for_stage(request, tokens_done, suspend=True)
            node.run_until(lambda answer=answer: bool(answer))
            if not isinstance(answer[0], KvPart):
                break
            tokens_done = answer.part.end
        assert tokens_done == 4 * BLOCK
        assert answer.final.request.num_output_tokens >= 1
        assert answer.final.tail.runs == [BlockRun(4, node.block_ids("r")[4:5])]
        node.call(node.scheduler.resume, "r")
        node.run_to_the_end()
        assert node.streams["r"] == undisturbed(list(range(150)), 10)

    def test_no_full_block_left_suspends_a_decoding_request_by_itself(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        node = make(kind)
        request = node.add("r", list(range(5 * BLOCK)))
        node.decode("r", 3)
        part = node.wait_for_stage(request).part
        assert len(part.block_ids) == 5
        answer = node.wait_for_stage(request, part.end)
        node.run_until(lambda: bool(answer))
        assert answer.final.tail.runs == [BlockRun(5, node.block_ids("r")[5:6])]
        node.call(node.scheduler.release, "r")

    def test_blocks_that_another_request_in_flight_still_computes_are_no_stage(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        """The prefix cache offers them to the next in line of the very step that is to compute them."""
        source, destination = make(kind), make(kind)
        prompt = list(range(10 * BLOCK))
        source.add("first", [*prompt, 1], max_tokens=3)
        second = source.add("second", [*prompt, 2], max_tokens=20)
        source.step()
        assert source.block_ids("second")[:10] == source.block_ids("first")[:10]
        if kind.overlapped:
            assert second.num_computed_tokens - second.num_in_flight_tokens == 10 * BLOCK
        move = Move(source, destination, "second")
        for _ in range(4):
            move.advance()  # as far as it gets before that step's output
        assert bool(move.tokens_done) == (not kind.overlapped)
        move.finish()
        assert move.committed
        source.run_to_the_end()
        destination.run_to_the_end()
        assert source.streams["second"] == undisturbed([*prompt, 2], 20)

    def test_an_aborted_request_is_gone(self, kind: Kind, make: Callable[..., Node]) -> None:
        node = make(kind, max_batched_tokens=64)
        request = node.add("r", PROMPT)
        node.step()
        answer = node.wait_for_stage(request, 99)
        assert not answer
        abort(node, "r")
        assert answer.gone

    def test_a_finished_request_is_gone(self, kind: Kind, make: Callable[..., Node]) -> None:
        node = make(kind, max_batched_tokens=64)
        request = node.add("r", PROMPT, max_tokens=1)
        node.step()
        answer = node.wait_for_stage(request, 99)
        node.run_to_the_end()
        assert answer.gone

    def test_a_preempted_request_is_gone_even_when_it_runs_again(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        """Its blocks are other ones: what has been copied is not a part of it any more."""
        node = make(kind, num_blocks=15)
        node.add("first", list(range(6 * BLOCK)), max_tokens=3 * BLOCK)
        request = node.add("r", list(range(500, 500 + 5 * BLOCK)), max_tokens=3 * BLOCK)
        node.decode("r")
        assert node.wait_for_stage(request, 0).part.end == 5 * BLOCK
        node.run_until(lambda: request.num_preemptions == 1)
        assert node.wait_for_stage(request, 5, incarnation=0).gone
        node.run_until(lambda: request.status is RequestStatus.RUNNING)
        assert node.wait_for_stage(request, 5, incarnation=0).gone
        node.decode("r", request.num_output_tokens + 2)
        assert node.wait_for_stage(request, 0).part.runs[0].first == 0
        node.run_to_the_end()
        assert node.streams["r"] == undisturbed(list(range(500, 500 + 5 * BLOCK)), 3 * BLOCK)

    def test_giving_up_answers_the_waiter(self, kind: Kind, make: Callable[..., Node]) -> None:
        node = make(kind, max_batched_tokens=64)
        request = node.add("r", PROMPT, max_tokens=20)
        node.step()
        answer = node.wait_for_stage(request, 99)
        node.call(node.scheduler.resume, "r")
        assert answer.gone
        node.run_to_the_end()
        assert node.streams["r"] == undisturbed(PROMPT, 20)

    @pytest.mark.parametrize("where", ["unknown", "waiting", "suspended"])
    def test_only_a_request_in_the_batch_can_start_to_move(
        self, kind: Kind, make: Callable[..., Node], where: str
    ) -> None:
        node = make(kind)
        if where != "unknown":
            request = node.add("r", PROMPT, max_tokens=10)
        if where == "suspended":
            node.decode("r")
            node.wait_for_stage(request, suspend=True)
        with pytest.raises(SourceGoneError):
            node.scheduler.running_request("r")
        node.call(node.scheduler.resume, "r")


class TestSuspension:
    def test_a_suspended_request_drains_and_is_not_scheduled(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        node = make(kind)
        request = node.add("r", PROMPT)
        node.add("other", PROMPT[:50])
        node.decode("r", 5)
        in_flight = 1 if kind.overlapped else 0
        assert request.num_in_flight_tokens == in_flight
        answer = node.wait_for_stage(request, suspend=True)
        assert request not in node.scheduler.running
        assert bool(answer) == (not in_flight)
        num_tokens = request.num_tokens
        for _ in range(3):
            node.step()
            assert "r" not in node.scheduled.num_scheduled_tokens
            assert "other" in node.scheduled.num_scheduled_tokens
        assert request.num_tokens == num_tokens + in_flight
        assert answer.final.request is request
        assert request.num_computed_tokens == request.num_tokens - 1
        (run,) = answer.final.tail.runs
        assert run == BlockRun(0, node.block_ids("r")[: -(-request.num_computed_tokens // BLOCK)])
        # Asked again, as when the final state was lost on its way: the same answer.
        assert node.wait_for_stage(request, 2 * BLOCK).final.tail.runs == [BlockRun(2, run.block_ids[2:])]
        node.call(node.scheduler.release, "r")
        abort(node, "other")
        assert node.streams["r"] == undisturbed(PROMPT, len(node.streams["r"]))

    def test_the_only_request_drains_too(self, overlapped: Kind, make: Callable[..., Node]) -> None:
        node = make(overlapped)
        request = node.add("r", PROMPT)
        node.decode("r")
        answer = node.wait_for_stage(request, suspend=True)
        assert not answer
        assert not node.scheduler.has_requests()
        node.step()
        assert answer.final.request is request
        node.call(node.scheduler.release, "r")

    def test_a_request_that_finishes_while_it_drains_is_gone(
        self, overlapped: Kind, make: Callable[..., Node]
    ) -> None:
        node = make(overlapped)
        request = node.add("r", PROMPT, max_tokens=5)
        node.decode("r", 4)
        answer = node.wait_for_stage(request, suspend=True)
        assert not answer
        node.step()
        assert answer.gone
        assert node.ended["r"] == "length"
        assert node.scheduler.migration.suspended == {}
        # The word that it is to go on may have been under way.
        node.call(node.scheduler.resume, "r")
        node.call(node.scheduler.release, "r")
        assert node.scheduler.running == []
        assert node.streams["r"] == undisturbed(PROMPT, 5)

    def test_a_resumed_request_does_not_wait_for_a_long_prompt(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        node = make(kind, max_batched_tokens=64)
        request = node.add("r", PROMPT, max_tokens=40)
        node.decode("r", 2)
        answer = node.wait_for_stage(request, suspend=True)
        node.add("long", list(range(1000)), max_tokens=2)
        node.steps(3)
        assert answer.final
        node.call(node.scheduler.resume, "r")
        node.step()
        assert node.scheduled.num_scheduled_tokens == {"r": 1, "long": 63}
        node.run_to_the_end()
        assert node.streams["r"] == undisturbed(PROMPT, 40)

    @pytest.mark.parametrize("drained", [False, True])
    def test_a_resumed_request_goes_on(self, kind: Kind, make: Callable[..., Node], drained: bool) -> None:
        node = make(kind)
        request = node.add("r", PROMPT, max_tokens=40)
        node.add("other", PROMPT[:40], max_tokens=40)
        node.decode("r", 5)
        node.wait_for_stage(request, suspend=True)
        if drained:
            node.steps(7)
        node.call(node.scheduler.resume, "r")
        node.call(node.scheduler.resume, "r")
        assert node.scheduler.running.count(request) == 1
        node.run_to_the_end()
        assert node.streams["r"] == undisturbed(PROMPT, 40)
        assert node.streams["other"] == undisturbed(PROMPT[:40], 40)

    def test_a_released_request_leaves_without_output(self, kind: Kind, make: Callable[..., Node]) -> None:
        node = make(kind)
        free = node.free_blocks
        request = node.add("r", PROMPT)
        node.decode("r", 5)
        answer = node.wait_for_stage(request, suspend=True)
        node.run_until(lambda: bool(answer))
        num_tokens = len(node.streams["r"])
        node.call(node.scheduler.release, "r")
        node.call(node.scheduler.release, "r")
        assert node.free_blocks == free
        assert "r" not in node.scheduler.requests
        node.step()
        assert "r" in node.scheduled.finished_req_ids
        node.run_to_the_end()
        assert len(node.streams["r"]) == num_tokens
        assert "r" not in node.ended

    @pytest.mark.parametrize("drained", [False, True])
    def test_an_aborted_suspended_request_leaves_nothing(
        self, kind: Kind, make: Callable[..., Node], drained: bool
    ) -> None:
        node = make(kind, max_num_seqs=2)
        request = node.add("r", PROMPT)
        node.decode("r", 5)
        answer = node.wait_for_stage(request, 99, suspend=True)
        if drained:
            node.run_until(lambda: bool(answer))
        abort(node, "r")
        assert node.scheduler.migration.suspended == {}
        if not drained and kind.overlapped:
            assert answer.gone
        assert node.wait_for_stage(request).gone
        node.call(node.scheduler.resume, "r")
        node.call(node.scheduler.release, "r")
        node.add("a", PROMPT[:40], max_tokens=3)
        node.add("b", PROMPT[:40], max_tokens=3)
        node.step()
        assert len(node.scheduled.num_scheduled_tokens) == 2  # both slots are there

    def test_the_prefix_cache_is_not_reset_meanwhile(self, kind: Kind, make: Callable[..., Node]) -> None:
        """vLLM preempts all running requests, and takes it for an error that blocks are held then."""
        node = make(kind)
        request = node.add("r", PROMPT, max_tokens=20)
        node.decode("r", 3)
        answer = node.wait_for_stage(request, suspend=True)
        node.run_until(lambda: bool(answer))
        assert node.call(node.scheduler.reset_prefix_cache, True) is False
        node.call(node.scheduler.resume, "r")
        node.run_to_the_end()
        assert node.streams["r"] == undisturbed(PROMPT, 20)

    def test_a_suspended_request_is_never_the_one_to_be_preempted(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        node = make(kind, num_blocks=12)
        other = node.add("other", list(range(4 * BLOCK)), max_tokens=5 * BLOCK)
        request = node.add("r", list(range(500, 500 + 4 * BLOCK)), max_tokens=2 * BLOCK)
        node.decode("r")
        node.wait_for_stage(request, suspend=True)
        blocks = node.block_ids("r")
        node.run_until(lambda: other.num_preemptions > 0)
        assert request.num_preemptions == 0
        assert node.block_ids("r") == blocks
        node.call(node.scheduler.resume, "r")
        node.run_to_the_end()
        assert node.streams["r"] == undisturbed(list(range(500, 500 + 4 * BLOCK)), 2 * BLOCK)
        assert node.streams["other"] == undisturbed(list(range(4 * BLOCK)), 5 * BLOCK)


class TestReservation:
    def reserve(
        self, node: Node, request_id: str = "r", prompt: list[int] = PROMPT, migration_id: str = "m"
    ) -> tuple[list[int], int]:
        """The blocks, and how many tokens are in them already."""
        request = node.request(request_id, prompt, 1000)
        reservation = node.call(node.scheduler.reserve, migration_id, request)
        return reservation.tables[0], reservation.tokens_present

    def test_a_reservation_holds_blocks_with_slack_that_the_scheduler_does_not_see(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        node = make(kind)
        free = node.free_blocks
        blocks, present = self.reserve(node)
        assert present == 0
        assert len(blocks) == len(set(blocks)) == 4 + SLACK_BLOCKS
        assert 0 not in blocks
        assert node.free_blocks == free - len(blocks)
        assert not node.scheduler.has_requests()
        assert check_scheduler(node.scheduler) == []
        node.call(node.scheduler.drop, "m")
        assert node.free_blocks == free
        node.call(node.scheduler.drop, "m")

    def test_a_reservation_is_refused_without_free_blocks(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        node = make(kind, num_blocks=6)
        with pytest.raises(DestinationRefusedError, match="no 6 free KV blocks"):
            self.reserve(node)
        assert node.problems() == []

    def test_blocks_that_a_prompt_in_progress_needs_are_not_reserved(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        node = make(kind, num_blocks=21, max_batched_tokens=BLOCK)
        node.add("long", list(range(15 * BLOCK)), max_tokens=2)
        node.step()
        assert node.free_blocks >= 15
        with pytest.raises(DestinationRefusedError, match="no 6 free KV blocks"):
            self.reserve(node)
        self.reserve(node, prompt=PROMPT[:10])
        node.run_to_the_end()
        node.call(node.scheduler.drop, "m")

    def test_a_reservation_is_refused_without_a_batch_slot(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        node = make(kind, max_num_seqs=2)
        request = node.add("running", PROMPT, max_tokens=10)
        node.decode("running")
        self.reserve(node, "a", migration_id="a")
        with pytest.raises(DestinationRefusedError, match="all 2 slots"):
            self.reserve(node, "b", migration_id="b")
        node.wait_for_stage(request, suspend=True)
        with pytest.raises(DestinationRefusedError, match="all 2 slots"):
            self.reserve(node, "b", migration_id="b")
        node.call(node.scheduler.resume, "running")
        node.run_to_the_end()
        self.reserve(node, "b", migration_id="b")
        for migration_id in "ab":
            node.call(node.scheduler.drop, migration_id)

    def test_a_request_that_is_here_may_be_reserved_for(self, kind: Kind, make: Callable[..., Node]) -> None:
        """Its older copy ends when it is committed; until then each stay has blocks of its own."""
        node = make(kind, prefix_caching=False)
        node.add("r", PROMPT, max_tokens=3)
        node.step()
        first, _ = self.reserve(node)
        second, _ = self.reserve(node, migration_id="again")
        assert len({*node.block_ids("r"), *first, *second}) == 4 + 2 * 6
        for migration_id in ("m", "again"):
            node.call(node.scheduler.drop, migration_id)
        node.run_to_the_end()
        assert node.streams["r"] == undisturbed(PROMPT, 3)

    def test_a_cached_prefix_is_shared(self, kind: Kind, make: Callable[..., Node]) -> None:
        source, destination = make(kind), make(kind)
        destination.add("earlier", [*PROMPT[:70], 7, 8, 9], max_tokens=10)
        destination.decode("earlier")
        source.add("r", PROMPT, max_tokens=60)
        source.decode("r", 3)
        move = Move(source, destination, "r")
        move.advance()
        assert move.tokens_done == 2 * BLOCK
        assert move.tables[0][:2] == destination.block_ids("earlier")[:2]
        abort(destination, "earlier")  # they stay, for the one that is arriving
        move.finish()
        assert move.committed
        destination.run_to_the_end()
        assert source.streams["r"] == undisturbed(PROMPT, 60)

    def test_all_blocks_may_be_cached_from_an_earlier_stay(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        here, there = make(kind), make(kind)
        here.add("r", PROMPT, max_tokens=100)
        here.decode("r", 30)
        migrate(here, there, "r")
        there.decode("r", 35)
        move = Move(there, here, "r")
        move.advance()
        assert move.tokens_done == 4 * BLOCK
        move.finish()
        assert move.committed
        assert move.stages == 1
        here.run_to_the_end()
        assert here.streams["r"] == undisturbed(PROMPT, 100)

    def test_a_reservation_grows(self, kind: Kind, make: Callable[..., Node]) -> None:
        node = make(kind, num_blocks=11)
        blocks, _ = self.reserve(node)
        grow = node.scheduler.grow
        assert node.call(grow, "m", 3 * BLOCK) == [blocks]
        (grown,) = node.call(grow, "m", 8 * BLOCK)
        assert grown[:6] == blocks
        assert len(set(grown)) == 8
        with pytest.raises(DestinationRefusedError, match="3 more KV blocks are needed, 2 are free"):
            node.call(grow, "m", 11 * BLOCK)
        assert node.call(grow, "m", 7 * BLOCK + 1) == [grown]
        with pytest.raises(DestinationRefusedError, match="nothing is reserved"):
            node.call(grow, "other", 1)
        node.call(node.scheduler.drop, "m")

    def test_blocks_that_a_step_in_flight_may_write_are_not_given_away(
        self, overlapped: Kind, make: Callable[..., Node]
    ) -> None:
        node = make(overlapped, num_blocks=8)
        node.add("leaving", PROMPT)
        node.decode("leaving")
        blocks = node.block_ids("leaving")
        abort(node, "leaving")
        assert node.free_blocks == 3  # the step in flight writes into the last of the other four
        prompt = [token + 500 for token in PROMPT]
        with pytest.raises(DestinationRefusedError, match="free KV blocks"):
            self.reserve(node, prompt=prompt)
        node.step()
        assert node.free_blocks == 7
        assert set(self.reserve(node, prompt=prompt)[0]) & set(blocks)
        node.call(node.scheduler.drop, "m")

    def test_blocks_of_a_request_that_finished_in_flight_are_not_given_away(
        self, overlapped: Kind, make: Callable[..., Node]
    ) -> None:
        """It was scheduled once more before the output that ended it was looked at."""
        node = make(overlapped, prefix_caching=False)
        request = node.add("r", PROMPT)
        node.decode("r", 2)
        request.sampling_params.stop_token_ids = [undisturbed(PROMPT, 3)[-1]]
        free = node.free_blocks
        node.run_until(lambda: "r" in node.ended)
        assert node.free_blocks == free
        node.step()
        assert node.free_blocks == 99


class TestCommit:
    def suspended(self, source: Node, destination: Node, request_id: str = "r") -> Move:
        """A migration whose tail is copied, but which is not committed."""
        move = Move(source, destination, request_id)
        move.advance()
        move.advance(suspend=True)
        source.run_until(lambda: bool(move.answer))
        tail = move.answer.final.tail
        destination.runner.copy_blocks_from(source.runner, move.block_pairs(tail))
        source.scheduler.migrated_blocks.unpin(move.migration_id)
        return move

    def test_a_committed_request_enters_before_waiting_requests(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        source, destination = make(kind), make(kind)
        source.add("r", PROMPT, max_tokens=50)
        source.decode("r", 10)
        move = self.suspended(source, destination)
        destination.add("waiting", list(range(30)), max_tokens=3)
        request = destination.commit(move.migration_id, move.answer.final)
        source.call(source.scheduler.release, "r")
        num_tokens = len(PROMPT) + len(source.streams["r"])
        destination.step()
        scheduled = destination.scheduled
        assert list(scheduled.num_scheduled_tokens) == ["r", "waiting"]
        assert scheduled.num_scheduled_tokens["r"] == 1
        cached, new = scheduled.scheduled_cached_reqs, scheduled.scheduled_new_reqs
        if kind.v2:
            assert [n.req_id for n in new] == ["r", "waiting"]
            assert cached.req_ids == []
            assert new[0].prefill_token_ids[:num_tokens] == PROMPT + source.streams["r"][: num_tokens - 100]
            assert new[0].prompt_token_ids == PROMPT
            assert new[0].num_computed_tokens == num_tokens - 1
            assert new[0].block_ids[0] == move.tables[0]
        else:
            assert [n.req_id for n in new] == ["waiting"]
            assert cached.req_ids == ["r"]
            assert cached.resumed_req_ids == {"r"}
            assert cached.num_computed_tokens == [num_tokens - 1]
            assert cached.num_output_tokens == [num_tokens - 100]
            assert cached.all_token_ids["r"][:num_tokens] == PROMPT + source.streams["r"][: num_tokens - 100]
            assert cached.new_block_ids[0][0] == move.tables[0]
        assert request.status is RequestStatus.RUNNING
        destination.run_to_the_end()
        assert source.streams["r"] == undisturbed(PROMPT, 50)

    def test_committed_blocks_are_in_the_prefix_cache(self, kind: Kind, make: Callable[..., Node]) -> None:
        source, destination = make(kind), make(kind)
        source.add("r", PROMPT, max_tokens=50)
        source.decode("r", 40)
        migrate(source, destination, "r")
        destination.add("same", PROMPT, max_tokens=50)
        destination.step()
        assert destination.block_ids("same")[:3] == destination.block_ids("r")[:3]
        destination.run_to_the_end()
        assert source.streams["r"] == source.streams["same"] == undisturbed(PROMPT, 50)

    def test_a_commit_allocates_blocks_for_tokens_beyond_the_reservation(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        source, destination = make(kind), make(kind)
        source.add("r", PROMPT, max_tokens=300)
        source.decode("r", 3)
        move = Move(source, destination, "r")
        move.advance()
        assert len(move.tables[0]) == 6
        source.decode("r", 150)
        move.finish()
        assert move.committed
        assert len(destination.block_ids("r")) == 8
        destination.run_to_the_end()
        assert source.streams["r"] == undisturbed(PROMPT, 300)

    def test_a_commit_is_refused_without_room_for_the_next_token(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        """128 tokens are computed, all of them fit; the 129th would not."""
        source, destination = make(kind), make(kind, num_blocks=8)
        source.add("r", PROMPT[:60], max_tokens=200)
        source.decode("r", 2)
        move = Move(source, destination, "r")
        move.advance()
        blocker = destination.request("blocker", [1], 10)
        destination.call(destination.scheduler.reserve, "b", blocker)
        source.decode("r", 69 - (1 if kind.overlapped else 0))
        move.advance(suspend=True)
        source.run_until(lambda: bool(move.answer))
        assert move.answer.final.request.num_computed_tokens == 128
        move.advance()
        assert move.over
        assert "more KV blocks are needed" in move.why
        destination.call(destination.scheduler.drop, "b")
        source.run_to_the_end()
        assert source.streams["r"] == undisturbed(PROMPT[:60], 200)

    def test_a_request_returns_in_the_step_in_which_it_left(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        """A V1 runner forgets the old stay in the step in which the new one begins."""
        here, there = make(kind), make(kind)
        here.add("r", PROMPT, max_tokens=60)
        here.decode("r")
        migrate(here, there, "r")
        there.decode("r", 5)
        migrate(there, here, "r")
        here.decode("r", 20)
        migrate(here, there, "r")
        for node in (here, there):
            node.run_to_the_end()
        assert here.streams["r"] == undisturbed(PROMPT, 60)

    def test_a_commit_without_reservation_is_refused(self, kind: Kind, make: Callable[..., Node]) -> None:
        node = make(kind)
        with pytest.raises(DestinationRefusedError, match="nothing is reserved"):
            node.scheduler.commit("m", 5)

    @pytest.mark.parametrize("steps", [0, 1, 2, 5])
    def test_a_drop_after_the_commit_ends_the_request_without_output(
        self, kind: Kind, make: Callable[..., Node], steps: int
    ) -> None:
        source, destination = make(kind), make(kind)
        source.add("r", PROMPT, max_tokens=40)
        source.decode("r", 5)
        move = self.suspended(source, destination)
        num_tokens = len(source.streams["r"])
        destination.commit(move.migration_id, move.answer.final)
        destination.steps(steps)
        assert destination.call(destination.scheduler.drop, move.migration_id) == "r"
        assert destination.call(destination.scheduler.drop, move.migration_id) is None
        destination.run_to_the_end()
        assert destination.problems() == []
        assert "r" not in source.ended
        del source.streams["r"][num_tokens:]  # the client follows the source
        source.call(source.scheduler.resume, "r")
        source.run_to_the_end()
        assert source.streams["r"] == undisturbed(PROMPT, 40)

    def test_blocks_that_are_read_outlive_their_request(self, kind: Kind, make: Callable[..., Node]) -> None:
        """Aborted or preempted at its source while its last blocks are being copied."""
        source, destination = make(kind, num_blocks=11), make(kind)
        source.add("r", PROMPT, max_tokens=50)
        source.decode("r", 2)
        move = Move(source, destination, "r")
        move.advance()
        move.advance(suspend=True)
        source.run_until(lambda: bool(move.answer))
        abort(source, "r")
        source.add("other", list(range(700, 700 + 5 * BLOCK)), max_tokens=5)
        source.run_to_the_end()
        assert source.free_blocks == 10 - 4
        assert check_scheduler(source.scheduler) == [f"4 blocks are pinned for {move.migration_id}"]
        assert check_scheduler(source.scheduler, {move.migration_id}) == []
        while not move.over:
            move.advance()
        assert not move.committed
        assert source.free_blocks == 10

    def test_blocks_are_not_shared_before_they_are_confirmed(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        """The copies may be garbage. Those that are decoded here depend on them."""
        source, destination = make(kind), make(kind)
        source.add("r", PROMPT, max_tokens=80)
        source.decode("r", 2)
        move = self.suspended(source, destination)
        request = destination.commit(move.migration_id, move.answer.final)
        pool = destination.scheduler.kv_cache_manager.block_pool
        destination.decode("r", 60)
        assert len(pool.cached_block_hash_to_block) == 0
        source.call(source.scheduler.release, "r")
        for _ in range(2):
            destination.call(destination.scheduler.publish, move.migration_id)
        assert len(pool.cached_block_hash_to_block) == request.num_computed_tokens // BLOCK
        destination.add("same", PROMPT, max_tokens=80)
        destination.run_to_the_end()
        assert source.streams["r"] == source.streams["same"] == undisturbed(PROMPT, 80)

    @pytest.mark.parametrize("confirmed", [False, True])
    def test_a_request_that_is_preempted_unconfirmed_is_computed_and_shared_again(
        self, kind: Kind, make: Callable[..., Node], confirmed: bool
    ) -> None:
        source, destination = make(kind), make(kind, num_blocks=9)
        source.add("r", PROMPT, max_tokens=80, priority=1)
        source.decode("r", 2)
        destination.add("first", list(range(40)), max_tokens=120)
        destination.step()
        move = self.suspended(source, destination)
        request = destination.commit(move.migration_id, move.answer.final)
        source.call(source.scheduler.release, "r")
        destination.run_until(lambda: request.num_preemptions)
        if confirmed:
            destination.call(destination.scheduler.publish, move.migration_id)
        destination.run_to_the_end()
        assert source.streams["r"] == undisturbed(PROMPT, 80)
        assert source.streams["first"] == undisturbed(list(range(40)), 120)

    def test_an_end_without_confirmation_shares_nothing(self, kind: Kind, make: Callable[..., Node]) -> None:
        """Its source may have ended it, and used its blocks again, before the last ones were copied."""
        source, destination = make(kind), make(kind)
        source.add("r", PROMPT, max_tokens=50)
        source.decode("r", 2)
        move = self.suspended(source, destination)
        destination.runner.memory.clear()  # garbage
        destination.commit(move.migration_id, move.answer.final)
        destination.runner.memory.update({block: [7] * BLOCK for block in move.tables[0]})
        destination.steps(2)
        destination.call(destination.scheduler.drop, move.migration_id)
        source.call(source.scheduler.release, "r")
        destination.add("same", PROMPT, max_tokens=10)
        destination.run_to_the_end()
        assert source.streams["same"] == undisturbed(PROMPT, 10)

    def test_a_drop_that_comes_late_does_not_end_its_next_stay(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        here, there = make(kind), make(kind)
        there.add("r", PROMPT, max_tokens=60)
        there.decode("r")
        first = migrate(there, here, "r")
        here.decode("r", 5)
        migrate(here, there, "r")
        there.decode("r", 10)
        migrate(there, here, "r")
        assert here.call(here.scheduler.drop, first.migration_id) is None
        here.run_to_the_end()
        assert here.streams["r"] == undisturbed(PROMPT, 60)

    def test_a_committed_request_does_not_wait_for_a_prompt_in_progress(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        source, destination = make(kind), make(kind, max_batched_tokens=64)
        source.add("r", PROMPT, max_tokens=30)
        source.decode("r", 5)
        move = self.suspended(source, destination)
        destination.add("long", list(range(1000)), max_tokens=2)
        destination.steps(2)
        destination.commit(move.migration_id, move.answer.final)
        source.call(source.scheduler.release, "r")
        for _ in range(3):
            destination.step()
            assert destination.scheduled.num_scheduled_tokens == {"long": 63, "r": 1}
        destination.run_to_the_end()
        assert source.streams["r"] == undisturbed(PROMPT, 30)
        assert source.streams["long"] == undisturbed(list(range(1000)), 2)

    def test_the_watermark_holds_up_no_request_that_has_come_with_its_blocks(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        source, destination = make(kind), make(kind, num_blocks=31, watermark=0.3)
        source.add("r", PROMPT, max_tokens=40)
        source.decode("r")
        for number in range(3):
            destination.add(f"here{number}", [number] * 4 * BLOCK, max_tokens=2 * BLOCK)
        destination.steps(2)
        move = Move(source, destination, "r")
        move.advance()
        assert move.tables[0], move.why
        destination.run_until(lambda: destination.free_blocks < 9)  # those that were here have grown
        destination.add("new", [7] * BLOCK, max_tokens=3)
        move.finish()
        assert move.committed, move.why
        destination.step()
        assert "r" in destination.scheduled.num_scheduled_tokens
        assert not destination.streams["new"], "an admission, which waits for the watermark"
        for node in (source, destination):
            node.run_to_the_end()
        assert destination.streams["r"] == undisturbed(PROMPT, 40)


class TestRecompute:
    def test_a_recomputed_request_continues_from_its_output_tokens(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        dead, heir = make(kind), make(kind, max_batched_tokens=64)
        lost = dead.add("r", PROMPT, max_tokens=40)
        dead.decode("r", 17)
        del dead.streams["r"][lost.num_output_tokens :]
        request = heir.copy_of("r", lost)
        abort(dead, "r")
        heir.scheduler.handoff_ids.add("r")
        started: list[list[str]] = []
        heir.scheduler.on_prefill_started = started.append
        heir.call(queue_for_recompute, heir.scheduler, request)
        heir.runner.install(request)
        heir.run_to_the_end()
        assert dead.streams["r"] == undisturbed(PROMPT, 40)
        assert started == [["r"]]  # a hand-off starts here too

    @pytest.mark.parametrize("steps", [1, 2, 3, 9])
    def test_a_request_is_recomputed_where_it_runs(
        self, kind: Kind, make: Callable[..., Node], steps: int
    ) -> None:
        """The token of a step in flight belongs to the copy that has ended."""
        node = make(kind)
        old = node.add("r", PROMPT, max_tokens=40)
        node.steps(steps)
        request = node.copy_of("r", old)
        del node.streams["r"][request.num_output_tokens :]
        abort(node, "r")
        node.call(queue_for_recompute, node.scheduler, request)
        node.runner.install(request)
        node.run_to_the_end()
        assert node.streams["r"] == undisturbed(PROMPT, 40)


class TestSlots:
    def test_suspended_and_arriving_requests_keep_their_slots(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        node, other = make(kind, max_num_seqs=3), make(kind)
        for name in "abcde":
            node.add(name, PROMPT[:40], max_tokens=20)
        node.decode("a", 2)
        assert len(node.scheduler.running) == 3
        away = node.wait_for_stage(node.scheduler.requests["a"], suspend=True)
        node.steps(4)
        assert away.final
        assert len(node.scheduler.running) == 2  # nobody takes the place of a suspended request
        node.call(node.scheduler.release, "a")
        node.step()
        assert len(node.scheduler.running) == 3
        node.run_until(lambda: len(node.scheduler.running) < 3)
        other.add("r", PROMPT, max_tokens=30)
        other.decode("r", 2)
        move = Move(other, node, "r")
        move.advance()
        for name in "fgh":
            node.add(name, PROMPT[:40], max_tokens=20)
        for _ in range(15):
            node.step()
            assert len(node.scheduler.running) <= 2
        move.finish()
        node.step()
        assert "r" in [request.request_id for request in node.scheduler.running]
        node.run_to_the_end()
        assert node.streams["r"] == undisturbed(PROMPT, 30)

    def test_a_committed_request_is_counted_before_it_is_in_the_batch(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        """Otherwise a second arrival would take its slot, and it would wait for the second's end."""
        source, destination = make(kind), make(kind, max_num_seqs=1)
        for name in "ab":
            source.add(name, PROMPT, max_tokens=30)
        source.decode("b", 2)
        Move(source, destination, "a").finish()
        second = Move(source, destination, "b")
        second.finish()
        assert "all 1 slots" in second.why
        destination.step()
        assert "a" in destination.scheduled.num_scheduled_tokens
        source.run_to_the_end()
        destination.run_to_the_end()
        assert source.streams["a"] == source.streams["b"] == undisturbed(PROMPT, 30)


class TestPriorities:
    def test_an_arrival_comes_before_more_urgent_requests_that_wait(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        source, destination = make(kind), make(kind, policy="priority", max_num_seqs=2)
        source.add("r", PROMPT, max_tokens=30, priority=9)
        source.decode("r", 2)
        move = Move(source, destination, "r")
        move.advance()
        for name in "abc":
            destination.add(name, PROMPT[:40], max_tokens=20, priority=-1)
        destination.steps(3)
        assert len(destination.scheduler.running) == 1
        move.finish()
        destination.step()
        assert "r" in destination.scheduled.num_scheduled_tokens
        for node in (source, destination):
            node.run_to_the_end()
        for name in "abc":
            assert source.streams[name] == undisturbed(PROMPT[:40], 20)
        assert source.streams["r"] == undisturbed(PROMPT, 30)

    def test_the_least_urgent_is_preempted_wherever_it_came_from(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        source, destination = make(kind), make(kind, policy="priority", num_blocks=15)
        source.add("r", list(range(4 * BLOCK)), max_tokens=100, priority=9)
        source.decode("r", 2)
        arrived = source.scheduler.requests["r"]
        destination.add("urgent", list(range(500, 500 + 5 * BLOCK)), max_tokens=200)
        destination.step()
        migrate(source, destination, "r")
        arrived = destination.scheduler.requests["r"]
        destination.run_to_the_end()
        assert arrived.num_preemptions > 0
        assert source.streams["r"] == undisturbed(list(range(4 * BLOCK)), 100)
        assert source.streams["urgent"] == undisturbed(list(range(500, 500 + 5 * BLOCK)), 200)


class TestHandOff:
    def test_the_first_step_of_a_prompt_starts_a_hand_off_once(
        self, kind: Kind, make: Callable[..., Node]
    ) -> None:
        source, destination = make(kind, max_batched_tokens=64), make(kind)
        moves: list[Move] = []
        source.scheduler.on_prefill_started = lambda ids: moves.extend(
            Move(source, destination, request_id) for request_id in ids
        )
        prompt = list(range(500))
        source.add("r", prompt, max_tokens=30)
        source.add("stays", PROMPT, max_tokens=5)
        source.scheduler.handoff_ids.add("r")
        source.step()
        (move,) = moves
        move.finish()
        assert move.committed
        assert move.stages > 4  # block by block behind the prefill
        assert len(source.streams["r"]) <= 2
        source.run_to_the_end()
        destination.run_to_the_end()
        assert len(moves) == 1
        assert source.scheduler.handoff_ids == set()
        assert source.streams["r"] == undisturbed(prompt, 30)

    def test_an_aborted_request_starts_no_hand_off(self, kind: Kind, make: Callable[..., Node]) -> None:
        node = make(kind)
        node.add("r", PROMPT)
        node.scheduler.handoff_ids.add("r")
        abort(node, "r")
        assert node.scheduler.handoff_ids == set()


@pytest.mark.parametrize("suspend", [False, True])
def test_a_request_moves_to_and_fro(kind: Kind, make: Callable[..., Node], suspend: bool) -> None:
    nodes = [make(kind, max_batched_tokens=64), make(kind, num_blocks=40)]
    for name in "abc":
        nodes[0].add(name, PROMPT[: ord(name) - 60], max_tokens=250)
    for node in nodes:
        node.add(f"neighbour of {id(node)}", list(range(50)), max_tokens=250)
    nodes[0].decode("c")
    hops = 0
    while not {"a", "b", "c"} <= nodes[0].ended.keys():
        for name in "abc":
            if name in nodes[0].ended:
                continue
            here = next(node for node in nodes if node.stay_of(name))
            there = nodes[1 - nodes.index(here)]
            move = Move(here, there, name)
            move.finish(suspend=suspend, step_destination=True)
            hops += move.committed
            for node in nodes:
                node.steps(2)
    assert hops > 60
    for node in nodes:
        node.run_to_the_end()
    for name in "abc":
        assert nodes[0].streams[name] == undisturbed(PROMPT[: ord(name) - 60], 250)
