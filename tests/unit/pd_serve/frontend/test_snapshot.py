"""What `GET /cluster` shows of an instance."""

import dataclasses
import json

import msgspec

from pd_serve.comm.cluster_state import ProcessStats, StartingInstance
from pd_serve.comm.messages import InstanceStats
from pd_serve.frontend.snapshot import ClusterSnapshot, InstanceSnapshot, TargetsSnapshot, WaitingRequests
from router.load import InstanceLoad
from tests.members import instance_info

INFO = instance_info("d0", pid=7)


def test_an_instance_is_starting_until_its_first_report() -> None:
    snapshot = InstanceSnapshot.of(INFO, None)

    assert (snapshot.state, snapshot.role, snapshot.node, snapshot.pid) == ("starting", "decode", "node", 7)
    assert snapshot.total_blocks == 0


def test_an_instance_has_the_role_and_numbers_of_its_report() -> None:
    load = InstanceLoad("d0", "prefill", total_blocks=10, free_blocks=4, running=2, waiting=1, migrating_in=3)

    snapshot = InstanceSnapshot.of(INFO, load)

    assert (snapshot.state, snapshot.role, snapshot.free_blocks) == ("ready", "prefill", 4)
    assert (snapshot.running, snapshot.waiting, snapshot.migrating_in) == (2, 1, 3)
    assert snapshot.freeness == 2.0


def test_an_instance_has_the_reason_why_its_requests_cannot_move() -> None:
    engine = dataclasses.replace(INFO.engine, no_migration="speculative decoding")
    info = dataclasses.replace(INFO, engine=engine)

    assert InstanceSnapshot.of(INFO, None).no_migration is None
    for load in (None, InstanceLoad("d0", "decode", total_blocks=10)):
        assert InstanceSnapshot.of(info, load).no_migration == "speculative decoding"


def test_an_instance_has_the_number_of_requests_that_cannot_move_by_reason() -> None:
    process = ProcessStats(1.0, 1.0, 1.0)
    stats = InstanceStats(process, 0, 0, 0, 0, 0, unmovable={"session": 2, "pooling": 0})
    load = InstanceLoad("d0", "decode", total_blocks=10)

    assert InstanceSnapshot.of(INFO, load, stats).unmovable == {"session": 2}
    assert InstanceSnapshot.of(INFO, load).unmovable == {}


def test_the_numbers_of_an_instance_explain_its_freeness() -> None:
    load = InstanceLoad(
        "d0",
        "decode",
        total_blocks=780,
        free_blocks=694,
        running=3,
        high_priority=1,
        head_of_line_blocks=4,
        block_tokens=16,
        preempted=1,
        expected_blocks=5,
        expected_requests=1,
    )

    shown = InstanceSnapshot.of(INFO, load)

    assert (shown.headroom_blocks, shown.queued_blocks, shown.expected_blocks) == (680, 4, 5)
    claimed = shown.headroom_blocks + shown.queued_blocks + shown.expected_blocks
    assert shown.freeness == (shown.free_blocks - claimed) / shown.batch == 5 / 4
    assert shown.preempted == 1


def test_a_draining_instance_has_no_freeness() -> None:
    snapshot = InstanceSnapshot.of(INFO, InstanceLoad("d0", "decode", total_blocks=10, draining=True))

    assert (snapshot.state, snapshot.draining, snapshot.freeness) == ("draining", True, None)


def test_an_instance_that_waits_for_resources_shows_that_as_its_state() -> None:
    snapshot = InstanceSnapshot.of_starting(StartingInstance("d9", "decode", "waiting for resources: 1 GPU"))

    assert (snapshot.id, snapshot.state, snapshot.pid) == ("d9", "waiting for resources: 1 GPU", 0)


def test_a_snapshot_is_flat_json() -> None:
    snapshot = ClusterSnapshot(
        instances=[InstanceSnapshot.of(INFO, None)], waiting_line=WaitingRequests(2, 64), migrations={}
    )

    shown = json.loads(msgspec.json.encode(snapshot))

    assert shown["instances"][0]["id"] == "d0"
    assert shown["waiting_line"] == {"requests": 2, "tokens": 64}
    assert shown["manager"] == "absent"


def test_attainment_is_unknown_without_requests_and_goodput_is_per_second() -> None:
    assert TargetsSnapshot.of(0, 0) == TargetsSnapshot(0, 0, None, 0.0)
    assert TargetsSnapshot.of(90, 60) == TargetsSnapshot(90, 60, 0.6667, 1.0)
    assert json.loads(msgspec.json.encode(TargetsSnapshot()))["attainment"] is None
