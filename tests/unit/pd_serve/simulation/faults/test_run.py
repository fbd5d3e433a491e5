"""Runs of whole clusters with single faults, and what the checks see if something is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from migration.token_span import TokenSpan
from pd_serve.comm.timing import ORPHAN_S, RECOVERY_S, START_TIMEOUT_S
from pd_serve.frontend.token_ledger import TokenLedger
from pd_serve.simulated_engine.block_pool import BlockPool
from pd_serve.simulation.faults.run import RunResult, run
from pd_serve.simulation.faults.schedule import (
    ClientRequest,
    FaultKind,
    FaultyClusterShape,
    Schedule,
    ScheduledFault,
)

ROOT = Path(__file__).parents[5]

REQUESTS = [ClientRequest(n / 4, 40 + 13 * n % 200, 30 + 11 * n % 60) for n in range(16)]


def faulty(*faults: ScheduledFault, requests: list[ClientRequest] = REQUESTS, **shape: object) -> RunResult:
    given = {"instances": {"prefill": 1, "decode": 2}, "start_instance_s": 1.0} | shape
    return run(Schedule(0, 1, FaultyClusterShape(**given), requests, list(faults)))  # type: ignore[arg-type]


def test_an_undisturbed_cluster_has_no_findings() -> None:
    result = faulty()

    assert result.findings == []
    assert result.tokens == sum(request.output_tokens for request in REQUESTS)


@pytest.mark.parametrize("target", ["decode:0", "manager", "scheduler", "api:0", "owner:8"])
def test_a_killed_process_of_any_kind_loses_nothing(target: str) -> None:
    assert faulty(ScheduledFault(2.5, FaultKind.KILL, target)).findings == []


def test_clients_of_a_killed_api_server_get_their_streams_from_another_one() -> None:
    deaths = [ScheduledFault(at_s, FaultKind.KILL, "api:0") for at_s in (1.5, 2.5, 3.5)]
    result = faulty(*deaths, api_servers=3, orphan_s=10.0, comes_back=True)

    assert result.findings == []
    assert result.recoveries["resumed"] > 2


@pytest.mark.parametrize("target", ["decode:0", "manager", "scheduler", "api:0", "prefill:0"])
@pytest.mark.parametrize("for_s", [0.7, 20.0])
def test_a_suspended_process_of_any_kind_loses_nothing(target: str, for_s: float) -> None:
    assert faulty(ScheduledFault(2.5, FaultKind.FREEZE, target, for_s=for_s)).findings == []


@pytest.mark.parametrize("on", ["Offer", "Stage", "Final", "Committed"])
def test_a_destination_that_dies_in_the_middle_of_a_migration_loses_nothing(on: str) -> None:
    target = "sender" if on == "Committed" else "receiver"

    result = faulty(ScheduledFault(1.0, FaultKind.KILL, target, on=on))

    assert result.findings == []
    assert result.deaths == 1


def test_clients_that_leave_leave_nothing_behind() -> None:
    requests = [ClientRequest(n / 4, 100, 60, aborts_after=5 * n % 60) for n in range(16)]

    result = faulty(requests=requests)

    assert result.findings == []
    assert result.tokens < 16 * 60


@pytest.mark.parametrize("target", ["decode:0", "prefill:0", "scheduler", "api:0", "manager"])
def test_a_process_that_hangs_for_ever_is_replaced(target: str) -> None:
    assert faulty(ScheduledFault(2.5, FaultKind.HANG, target)).findings == []


@pytest.mark.parametrize("lost", ["StartInstance", "StopInstance", "SetDraining", "Membership"])
def test_lost_orders_of_the_scheduler_and_the_manager_are_given_again(lost: str) -> None:
    scaling = {"scale_interval_s": 0.5, "drain_after_s": 0.0}
    faults = [ScheduledFault(0.0, FaultKind.LOSE_NEXT, other=lost, for_s=30.0, value=3.0)]

    assert faulty(*faults, autoscale={"decode": (1, 4)}, settings=scaling).findings == []


def test_an_instance_that_its_manager_cannot_end_ends_itself() -> None:
    faults = [
        ScheduledFault(2.0, FaultKind.LOSE_STOPS, value=1.0),
        ScheduledFault(2.1, FaultKind.DRAIN_STOP, "decode:0"),
    ]

    result = faulty(*faults)

    assert result.findings == []
    assert result.deaths == 1
    assert result.simulated_s > ORPHAN_S


def test_a_manager_that_takes_over_ends_an_instance_that_the_last_one_could_not_end() -> None:
    faults = [
        ScheduledFault(2.0, FaultKind.LOSE_STOPS, value=1.0),
        ScheduledFault(2.1, FaultKind.DRAIN_STOP, "decode:0"),
        ScheduledFault(4.0, FaultKind.KILL, "manager"),
    ]

    assert faulty(*faults).findings == []


def test_a_start_that_fails_after_another_manager_has_taken_over_is_left() -> None:
    """The other one waits for an instance that stands still, and does not see what is started meanwhile."""
    faults = [
        ScheduledFault(2.0, FaultKind.FREEZE, "prefill:0", for_s=13.0),
        ScheduledFault(2.1, FaultKind.TWIN, "manager"),
        ScheduledFault(2.2, FaultKind.FAILED_START, value=1.0),
        ScheduledFault(2.3, FaultKind.KILL, "decode:0"),
    ]

    assert faulty(*faults, start_instance_s=16.0).findings == []


def test_a_start_whose_answer_is_lost_is_ordered_again() -> None:
    """The only other instance dies, and requests wait for less long than a start may take."""
    faults = [ScheduledFault(2.0, FaultKind.LOSE_STARTS, value=2.0)]
    faults += [ScheduledFault(2.1 + number, FaultKind.KILL, "instance:0") for number in range(2)]

    result = faulty(*faults)

    assert result.findings == []
    assert result.deaths == 2
    assert result.simulated_s < ORPHAN_S


def test_a_request_may_fail_when_no_instance_comes_for_longer_than_it_waits() -> None:
    """Starts that are given up meanwhile do not shorten the time without an instance."""
    starved = ScheduledFault(2.0, FaultKind.STARVE, for_s=START_TIMEOUT_S + RECOVERY_S / 2)
    kills = [ScheduledFault(2.1, FaultKind.KILL, "instance:0") for _ in range(3)]

    assert faulty(starved, *kills).findings == []


@pytest.mark.parametrize("on", ["Offer", "Stage", "Committed"])
def test_the_client_of_the_request_that_moves_leaves_and_its_blocks_are_free(on: str) -> None:
    result = faulty(ScheduledFault(1.0, FaultKind.ABORT, "request", on=on))

    assert result.findings == []
    assert result.tokens < sum(request.output_tokens for request in REQUESTS)


@pytest.mark.parametrize("seconds", [-600.0, 600.0])
def test_a_jump_of_the_wall_clocks_changes_nothing(seconds: float) -> None:
    """Also where the manager and all instances die, so that only the API servers know its term."""
    kills = [ScheduledFault(2.5, FaultKind.KILL, target) for target in ("manager", *["instance:0"] * 3)]

    assert faulty(ScheduledFault(2.4, FaultKind.WALL, value=seconds), *kills).findings == []


def test_the_drain_of_an_instance_that_dies_while_there_is_no_manager_ends_with_it() -> None:
    faults = [
        ScheduledFault(2.0, FaultKind.DRAIN, "decode:0"),
        ScheduledFault(4.0, FaultKind.KILL, "manager"),
        ScheduledFault(4.1, FaultKind.KILL, "decode:0"),
    ]

    assert faulty(*faults).findings == []


def test_the_lost_order_to_use_an_instance_again_is_repeated() -> None:
    faults = [
        ScheduledFault(2.0, FaultKind.DRAIN, "decode:0"),
        ScheduledFault(4.0, FaultKind.RESET, "manager", "decode:0", for_s=0.5, value=1.0),
        ScheduledFault(4.1, FaultKind.UNDO),
    ]

    assert faulty(*faults).findings == []


def test_a_manager_whose_messages_do_not_arrive_ends_no_instance() -> None:
    """API servers find it through the platform; the instances do not know it."""
    faults = [
        ScheduledFault(2.0, FaultKind.RESET, "manager", for_s=60.0, value=1.0),
        ScheduledFault(4.0, FaultKind.KILL, "manager"),
    ]

    assert faulty(*faults).findings == []


def test_instances_that_start_while_the_manager_is_cut_off_are_cut_off_too() -> None:
    """The manager may end them: they cannot learn where to report. It ends no other instance."""
    faults = [
        ScheduledFault(2.0, FaultKind.RESTART),
        ScheduledFault(2.1, FaultKind.CUT, "manager", for_s=45.0, value=1.0),
    ]
    assert faulty(*faults, start_instance_s=3.0).findings == []


def test_an_operation_whose_call_is_lost_is_answered_with_an_error() -> None:
    faults = [
        ScheduledFault(3.0, FaultKind.RESET, "api:0", for_s=20.0, value=2.0),
        ScheduledFault(3.5, FaultKind.MIGRATE, "prefill:0", value=10.0),
    ]

    assert faulty(*faults, api_servers=1).findings == []


def test_a_manager_may_die_while_it_starts_the_first_instances() -> None:
    """Python would run the cleanup of its tasks when the simulation drops them, after the run."""
    kills = [ScheduledFault(2.5, FaultKind.KILL, target) for target in ("manager", *["instance:0"] * 3)]
    again = [ScheduledFault(at_s, FaultKind.KILL, "manager") for at_s in (7.0, 11.0, 15.0)]

    assert faulty(*kills, *again, start_instance_s=8.0).findings == []


def test_pools_have_their_time_after_the_last_start_that_fails() -> None:
    """A start is tried again with longer and longer pauses, for longer than the bound of a run."""
    faults = [
        ScheduledFault(2.0, FaultKind.FAILED_START, value=8.0),
        ScheduledFault(2.1, FaultKind.KILL, "decode:0"),
    ]

    result = faulty(*faults)

    assert result.findings == []
    assert result.simulated_s > 300.0


def test_either_of_two_sizes_is_right_when_the_orders_are_answered_together() -> None:
    """An operation is answered when all instances have noted it, and one of them stands still."""
    faults = [
        ScheduledFault(3.0, FaultKind.FREEZE, "decode:0", for_s=2.5),
        ScheduledFault(3.28, FaultKind.SCALE, "prefill", value=1.0),
        ScheduledFault(4.42, FaultKind.SCALE, "prefill", value=-1.0),
    ]

    assert faulty(*faults, instances={"prefill": 2, "decode": 2}).findings == []


def test_a_larger_pool_may_use_an_instance_again_that_is_being_stopped() -> None:
    faults = [
        ScheduledFault(3.0, FaultKind.DRAIN_STOP, "decode:0"),
        ScheduledFault(3.05, FaultKind.SCALE, "decode", value=1.0),
        ScheduledFault(3.1, FaultKind.UNDO),
    ]

    assert faulty(*faults).findings == []


def test_the_stop_of_an_instance_that_a_smaller_pool_stops_anyway_makes_it_no_smaller() -> None:
    faults = [
        ScheduledFault(3.0, FaultKind.FREEZE, "api:0", for_s=8.0),  # it may use the instance: the stop waits
        ScheduledFault(3.1, FaultKind.SCALE, "decode", value=-1.0),
        ScheduledFault(4.0, FaultKind.DRAIN_STOP, "decode:0"),
        ScheduledFault(4.1, FaultKind.DRAIN_STOP, "decode:1"),
    ]

    assert faulty(*faults, instances={"prefill": 1, "decode": 3}).findings == []


def test_an_operation_may_have_begun_whose_api_server_dies_before_the_answer() -> None:
    faults = [
        ScheduledFault(3.0, FaultKind.FREEZE, "prefill:0", for_s=4.0),
        ScheduledFault(3.2, FaultKind.DRAIN_STOP, "decode:0"),
        ScheduledFault(4.0, FaultKind.KILL, "api:0"),
    ]

    assert faulty(*faults, api_servers=1).findings == []


def test_slow_readers_get_everything() -> None:
    requests = [ClientRequest(n / 4, 100, 60, reads_every_s=0.1 * 3**n) for n in range(6)]

    result = faulty(ScheduledFault(2.5, FaultKind.KILL, "owner:5"), requests=requests)

    assert result.findings == []
    assert result.tokens == 6 * 60


def test_a_slow_reader_may_leave_before_and_after_the_end_of_its_request() -> None:
    requests = [ClientRequest(n / 4, 100, 60, aborts_after=30, reads_every_s=0.5 * 3**n) for n in range(4)]

    assert faulty(requests=requests).findings == []


def test_outputs_that_chance_decides_are_whole_too() -> None:
    result = faulty(ScheduledFault(2.5, FaultKind.KILL, "decode:0"), sampled=True)

    assert result.findings == []
    assert result.recoveries["died"] >= 1


def test_a_flipped_bit_shows_in_the_tokens_of_its_request_only() -> None:
    assert faulty(ScheduledFault(2.5, FaultKind.FLIP, "decode:0")).findings == []


def test_a_flipped_bit_that_would_not_show_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from pd_serve.simulation.faults.effects import Effects

    def flip_nothing(self: Effects, name: str) -> None:
        self.flips.append(("8.1", self.num_computed_anew()))

    monkeypatch.setattr(Effects, "_flip", flip_nothing)

    (finding,) = faulty(ScheduledFault(2.5, FaultKind.FLIP, "decode:0")).findings
    assert "flipped bit does not show" in finding


def test_a_token_that_is_delivered_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    extend = TokenLedger.extend

    def twice(self: TokenLedger, source: str, span: TokenSpan, output: object, now: float) -> object:
        before = extend(self, source, span, output, now)  # type: ignore[arg-type]
        if before is not None and span[1] == 20:
            output.new_token_ids *= 2  # type: ignore[attr-defined]
        return before

    monkeypatch.setattr(TokenLedger, "extend", twice)

    assert any("token 21" in finding for finding in faulty().findings)


def test_a_block_that_is_not_freed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    release = BlockPool.release
    monkeypatch.setattr(BlockPool, "release", lambda self, blocks: release(self, blocks[1:]))

    assert any("KV blocks" in finding for finding in faulty().findings)


def test_a_run_is_a_function_of_its_seed_whatever_python_hashes_with() -> None:
    code = """
from pd_serve.simulation.faults.run import run
from pd_serve.simulation.faults.draw import draw
print([run(draw(seed, 3)).digest for seed in (1, 2)])
"""

    def digests(hash_seed: str) -> str:
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    assert digests("1") == digests("2")


def test_a_trace_names_faults_and_the_ends_of_processes() -> None:
    schedule = Schedule(
        0,
        1,
        FaultyClusterShape({"prefill": 1, "decode": 2}),
        REQUESTS,
        [ScheduledFault(2.0, FaultKind.KILL, "decode:1")],
    )

    lines = run(schedule, trace=True).trace

    assert any("kill decode:1 (decode-1)" in line for line in lines)
    assert any("decode-1 is dead" in line for line in lines)
    assert run(schedule).trace == []
