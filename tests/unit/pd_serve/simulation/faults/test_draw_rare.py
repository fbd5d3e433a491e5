"""Rare faults, drawn from seeds."""

from collections import Counter

from pd_serve.simulation.faults.draw import draw
from pd_serve.simulation.faults.draw_rare import ABOUT_REQUESTS, CONTROL, MESSAGES
from pd_serve.simulation.faults.schedule import FaultKind, ScheduledFault

SCHEDULES = [draw(seed, 4) for seed in range(600)]
FAULTS: list[ScheduledFault] = [fault for schedule in SCHEDULES for fault in schedule.faults]


def test_the_next_messages_of_every_type_are_lost() -> None:
    lost = {fault.other for fault in FAULTS if fault.kind is FaultKind.LOSE_NEXT}

    assert lost == set(MESSAGES)
    assert set(CONTROL) < lost


def test_clients_leave_at_each_stage_of_a_request() -> None:
    left = {f.on for f in FAULTS if f.kind is FaultKind.ABORT and f.target == "request"}

    assert left == set(ABOUT_REQUESTS)


def test_processes_of_several_kinds_die_at_the_same_moment() -> None:
    together: set[str] = set()
    for schedule in SCHEDULES:
        kills = [fault for fault in schedule.faults if fault.kind is FaultKind.KILL]
        for at_s, count in Counter(kill.at_s for kill in kills).items():
            kinds = {kill.target.partition(":")[0] for kill in kills if kill.at_s == at_s}
            together |= kinds if count == len(kinds) > 1 else set()

    assert together == {"manager", "scheduler", "api", "instance", "owner"}


def test_pools_scale_by_each_rule() -> None:
    settings = [schedule.shape.settings for schedule in SCHEDULES if schedule.shape.autoscale]

    assert {s["scaling"] for s in settings if "scaling" in s} == {"freeness", "work"}
    assert any(s.get("roles") for s in settings)


def test_clients_come_back_also_where_requests_end_with_their_api_server() -> None:
    assert {(s.shape.comes_back, s.shape.orphan_s > 0) for s in SCHEDULES} >= {(True, True), (True, False)}
