"""Events in, timelines out."""

import math
from collections.abc import Mapping
from typing import Any

import pytest

from migration.messages import CopyStage
from pd_serve.observe.recorder import Observer, RequestRecorder, is_named, names
from pd_serve.observe.timeline import MAX_ENTRIES, ObservedMigration, RequestStage, Stay, Timeline
from router.request import NewRequest
from router.slo import NO_SLO, Slo
from tests.unit.pd_serve.made_migrations import FULL, migrated


class Listener(Observer):
    """Keeps what it hears, one word each."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def issued(self, request: Timeline) -> None:
        self.heard.append("issued")

    def dispatched(self, request: Timeline, stay: Stay) -> None:
        self.heard.append(("dispatched", stay.instance))

    def first_token(self, request: Timeline) -> None:
        self.heard.append("first token")

    def stage(self, request: Timeline, stage: RequestStage) -> None:
        self.heard.append((stage.name, stage.instance, stage.begin, stage.end))

    def moved(self, request: Timeline, stay: Stay) -> None:
        self.heard.append(("moved", stay.instance))

    def migrated(self, request: Timeline, migration: ObservedMigration) -> None:
        self.heard.append((migration.record.reason, migration.record.outcome))

    def downtime(self, request: Timeline, migration: ObservedMigration) -> None:
        self.heard.append(("downtime", migration.record.destination, migration.downtime_s))

    def lost(self, request: Timeline, instance: str, reason: str) -> None:
        self.heard.append(("lost", instance, reason))

    def ended(self, request: Timeline) -> None:
        self.heard.append(("ended", request.outcome))

    def token_gaps(self, gaps: Mapping[float, int]) -> None:
        self.heard.append(dict(gaps))


class World:
    def __init__(self, **options: Any) -> None:
        self.listener = Listener()
        self.recorder = RequestRecorder([self.listener], **options)

    def prefilled(self, request_id: str = "r", name: str = "") -> None:
        """Issued at 10, sent to p0 at 11; its prefill begins at 12, its first token comes at 15."""
        self.recorder.issued(request_id, 10.0, NewRequest(100), name=name)
        self.recorder.dispatched(request_id, "p0", "prefill", 11.0)
        self.recorder.first_token_from(request_id, "p0", "prefill", 15.0, prefill_s=3.0)

    def migrated(
        self, source: str, destination: str, now: float, *, committed: bool = True, **more: Any
    ) -> None:
        fields = {"reason": "handoff", "duration_s": 2.0} | more
        refusal = None if committed else FULL
        self.recorder.migrated(migrated("r", source, destination, refusal=refusal, **fields), now)

    @property
    def stages(self) -> list[Any]:
        names = ("dispatch", "queue", "prefill", "handoff", "decode")
        return [entry for entry in self.listener.heard if entry[0] in names]

    @property
    def only(self) -> dict[str, Any]:
        (found,) = self.recorder.find("r")
        return found


@pytest.fixture
def world() -> World:
    return World()


def test_a_request_that_is_handed_off(world: World) -> None:
    world.prefilled()
    world.recorder.first_token_from("r", "d0", "decode", 16.0, gap_s=1.0)
    world.migrated("p0", "d0", 16.5)
    world.recorder.ended("r", "length", 20.0, tokens=9, longest_gap_s=1.0)

    assert world.listener.heard == [
        "issued",
        ("dispatch", "p0", 10.0, 11.0),
        ("dispatched", "p0"),
        ("queue", "p0", 11.0, 12.0),
        ("prefill", "p0", 12.0, 15.0),
        "first token",
        ("handoff", "p0", 15.0, 16.0),
        ("moved", "d0"),
        ("handoff", "committed"),
        ("downtime", "d0", 1.0),
        ("decode", "d0", 16.0, 20.0),
        ("ended", "length"),
    ]
    assert world.only["ttft_s"] == 5.0
    assert world.only["e2e_s"] == 10.0
    assert (world.only["output_tokens"], world.only["longest_gap_s"]) == (9, 1.0)


def test_without_the_engine_s_word_the_queue_counts_as_prefill(world: World) -> None:
    world.recorder.issued("r", 10.0, NewRequest(100))
    world.recorder.dispatched("r", "n0", "neutral", 10.0)
    world.recorder.first_token_from("r", "n0", "neutral", 12.0)

    assert world.stages == [("dispatch", "n0", 10.0, 10.0), ("prefill", "n0", 10.0, 12.0)]


def test_a_request_that_stays_with_its_prefill_instance_decodes_there(world: World) -> None:
    world.prefilled()
    world.migrated("p0", "d0", 16.0, committed=False)
    world.recorder.ended("r", "stop", 18.0, tokens=3)

    assert world.stages[-1] == ("decode", "p0", 15.0, 18.0)
    aborted = world.only["migrations"][0]
    assert (aborted["outcome"], aborted["code"], aborted["why"]) == ("aborted", "no_free_blocks", "full")
    assert world.only["migrations"][0]["downtime_s"] is None


@pytest.mark.parametrize("word_first", [False, True])
def test_the_downtime_is_known_when_token_and_word_are_there(world: World, word_first: bool) -> None:
    world.prefilled()
    if word_first:
        world.migrated("p0", "d0", 15.9)
    world.recorder.first_token_from("r", "d0", "decode", 16.0, gap_s=0.25)
    if not word_first:
        world.migrated("p0", "d0", 16.1)

    assert [entry for entry in world.listener.heard if entry[0] == "downtime"] == [("downtime", "d0", 0.25)]


def test_there_and_back_each_migration_has_its_own_downtime(world: World) -> None:
    world.prefilled()
    for number, (source, destination) in enumerate([("p0", "d0"), ("d0", "d1"), ("d1", "d0")], 1):
        world.recorder.first_token_from("r", destination, "decode", 15.0 + number, gap_s=number)
        world.migrated(source, destination, 15.5 + number)

    assert [m["downtime_s"] for m in world.only["migrations"]] == [1, 2, 3]
    assert [stay["instance"] for stay in world.only["instances"]] == ["p0", "d0", "d1", "d0"]


def test_first_tokens_of_two_owners_at_once(world: World) -> None:
    """The second one's was early and had to wait for the first one's."""
    world.recorder.issued("r", 10.0, NewRequest(100))
    world.recorder.dispatched("r", "p0", "prefill", 10.0)
    world.recorder.first_token_from("r", "d0", "decode", 12.0, gap_s=0.0, prefill_s=1.0)

    assert world.stages == [("dispatch", "p0", 10.0, 10.0), ("prefill", "p0", 10.0, 12.0)]
    assert world.only["ttft_s"] == 2.0
    assert [stay["instance"] for stay in world.only["instances"]] == ["p0", "d0"]


def test_a_request_taken_back_by_its_source_has_not_moved(world: World) -> None:
    world.prefilled()
    world.recorder.first_token_from("r", "p0", "prefill", 17.0, gap_s=2.0)

    assert ("moved", "p0") not in world.listener.heard
    assert len(world.only["instances"]) == 1


def test_a_request_whose_instance_dies_begins_again(world: World) -> None:
    world.prefilled()
    world.recorder.lost("r", "p0", "died", 16.0)
    assert world.only["state"] == "waiting"
    world.recorder.dispatched("r", "p1", "prefill", 16.5)
    assert world.only["state"] == "prefill"
    world.recorder.first_token_from("r", "p1", "prefill", 19.0, gap_s=4.0, prefill_s=2.0)

    assert world.stages[-4:] == [
        ("handoff", "p0", 15.0, 16.0),
        ("dispatch", "p1", 16.0, 16.5),
        ("queue", "p1", 16.5, 17.0),
        ("prefill", "p1", 17.0, 19.0),
    ]
    assert world.listener.heard.count("first token") == 1
    assert ("lost", "p0", "died") in world.listener.heard
    assert world.only["recomputes"] == 1
    assert [stay["recompute"] for stay in world.only["instances"]] == [False, True]


def test_a_migration_is_shown_with_its_stages(world: World) -> None:
    world.prefilled()
    copies = (CopyStage(0.5, 1.0, 7), CopyStage(1.5, 1.75, 1))
    world.migrated(
        "p0", "d0", 16.0, copies=copies, stages=2, blocks=8, tokens=250, bytes_copied=4096, reason="balance"
    )

    assert world.only["migrations"] == [
        {
            "reason": "balance",
            "source": "p0",
            "destination": "d0",
            "outcome": "committed",
            "code": None,
            "why": "",
            "begin_s": 4.0,
            "end_s": 6.0,
            "stages": [
                {"begin_s": 4.5, "end_s": 5.0, "blocks": 7},
                {"begin_s": 5.5, "end_s": 5.75, "blocks": 1},
            ],
            "blocks": 8,
            "tokens": 250,
            "bytes": 4096,
            "downtime_s": None,
        }
    ]


def test_the_word_about_a_migration_may_come_after_the_end(world: World) -> None:
    world.prefilled()
    world.recorder.first_token_from("r", "d0", "decode", 16.0, gap_s=1.0)
    world.recorder.ended("r", "stop", 16.0, tokens=2)
    world.migrated("p0", "d0", 16.5)

    assert world.only["migrations"][0]["downtime_s"] == 1.0


def test_what_is_not_known_is_not_recorded(world: World) -> None:
    """A request of another API server, or one that was ended too long ago."""
    world.recorder.dispatched("r", "p0", "prefill", 1.0)
    world.recorder.first_token_from("r", "p0", "prefill", 2.0)
    world.migrated("p0", "d0", 3.0)
    world.recorder.lost("r", "p0", "died", 4.0)
    world.recorder.ended("r", "stop", 5.0)

    assert world.listener.heard == []
    assert world.recorder.find("r") == []


def test_ended_requests_are_kept_up_to_a_number() -> None:
    world = World(keep_ended=2)
    for request_id in ("a", "b", "c"):
        world.recorder.issued(request_id, 1.0, NewRequest(1))
        world.recorder.ended(request_id, "abort", 2.0)

    assert [len(world.recorder.find(request_id)) for request_id in ("a", "b", "c")] == [0, 1, 1]


def test_what_one_request_keeps_is_bounded(world: World) -> None:
    world.prefilled()
    for number in range(2 * MAX_ENTRIES):
        world.recorder.first_token_from("r", f"d{number % 2}", "decode", 20.0 + number, gap_s=0.1)

    assert len(world.only["stages"]) == len(world.only["instances"]) == MAX_ENTRIES


def test_times_are_since_the_request_was_issued_which_is_unix_time() -> None:
    world = World(unix_offset_s=1e9)
    world.prefilled()

    assert world.only["issued_at"] == 1e9 + 10.0
    assert world.only["stages"][-1] == {"stage": "prefill", "instance": "p0", "begin_s": 2.0, "end_s": 5.0}


def test_gaps_are_passed_on(world: World) -> None:
    world.recorder.token_gaps({0.5: 3})

    assert world.listener.heard == [{0.5: 3}]


def test_a_request_is_found_by_every_name_of_it(world: World) -> None:
    for number in range(2):
        world.prefilled(f"{number}_cmpl-demo-1-abc", name="cmpl-demo-1")
    world.recorder.ended("1_cmpl-demo-1-abc", "stop", 20.0)

    def found(name: str) -> list[str]:
        return [request["id"] for request in world.recorder.find(name)]

    assert found("1_cmpl-demo-1-abc") == ["1_cmpl-demo-1-abc"]
    assert found("demo") == found("cmpl-demo-1") == ["0_cmpl-demo-1-abc", "1_cmpl-demo-1-abc"]
    assert found("dem") == found("demo-1-abc") == []


@pytest.mark.parametrize("name", ["a", "cmpl-a", "chatcmpl-a", "resp_a", "cmpl-a-0", "a_1"])
def test_what_vllm_may_make_of_a_name(name: str) -> None:
    assert names("a").fullmatch(name)
    assert not names("b").fullmatch(name)


@pytest.mark.parametrize(
    ("name", "vllm_id", "client_id", "is_name"),
    [
        ("call", "cmpl-call-0", "call", True),
        ("cmpl-call", "cmpl-call-0", "call", True),
        ("cmpl-call-0", "cmpl-call-0", "call", True),
        ("call", "resp_0123abcd_0", "call", True),
        ("resp_0123abcd", "resp_0123abcd_0", "call", True),
        ("call", "generate-tokens-call", "call", True),
        ("call", "cmpl-call-0", "", True),  # named in the body
        ("call", "chatcmpl-call-1", "call-1", False),
        ("chatcmpl-call", "chatcmpl-call-1", "call-1", False),
        ("call-1", "chatcmpl-call-1", "call-1", True),
        ("all", "cmpl-call-0", "call", False),
        ("", "cmpl-0", "", False),
    ],
)
def test_the_names_of_a_request(name: str, vllm_id: str, client_id: str, is_name: bool) -> None:
    assert is_named(name, vllm_id, client_id) == is_name


# ---- targets


def outcome_of(
    slo: Slo, first_s: float | None, end_s: float, tokens: int = 11, outcome: str = "stop"
) -> tuple[bool, bool, bool] | None:
    """Whether a request with these times has met its targets: the first one, the second one, all."""
    ended: list[Timeline] = []

    class Ended(Observer):
        def ended(self, request: Timeline) -> None:
            ended.append(request)

    recorder = RequestRecorder([Ended()])
    recorder.issued("r", 100.0, NewRequest(10, slo=slo))
    recorder.dispatched("r", "p0", "prefill", 100.0)
    if first_s is not None:
        recorder.first_token_from("r", "p0", "prefill", 100.0 + first_s)
    recorder.ended("r", outcome, 100.0 + end_s, tokens=tokens if first_s is not None else 0)
    met = ended[0].met
    return None if met is None else (met.ttft, met.itl, met.all)


@pytest.mark.parametrize(
    ("first_s", "end_s", "met"),
    [
        (1.0, 2.0, (True, True, True)),
        (1.1, 2.0, (False, True, False)),
        (1.0, 2.2, (True, False, False)),
        (1.5, 9.0, (False, False, False)),
    ],
)
def test_a_request_meets_targets_by_its_first_token_and_its_mean_time_per_later_one(
    first_s: float, end_s: float, met: tuple[bool, bool, bool]
) -> None:
    assert outcome_of(Slo(1.01, 0.101), first_s, end_s) == met


def test_a_single_token_has_no_time_per_later_one() -> None:
    assert outcome_of(Slo(1.0, 0.1), 0.5, 0.5, tokens=1) == (True, True, True)


def test_without_targets_there_is_no_outcome() -> None:
    assert outcome_of(NO_SLO, 0.5, 1.0) is None


def test_a_target_that_a_request_does_not_have_is_met() -> None:
    assert outcome_of(Slo(math.inf, 0.1), 1e6, 1e6 + 0.5) == (True, True, True)
    assert outcome_of(Slo(1.0, math.inf), 0.5, 1e6) == (True, True, True)


def test_a_failed_request_meets_nothing() -> None:
    assert outcome_of(Slo(1.0, 0.1), 0.1, 0.2, outcome="error") == (False, False, False)


def test_a_client_that_gives_up_after_its_target_has_seen_it_missed() -> None:
    assert outcome_of(Slo(1.0, 0.1), None, 1.5, outcome="abort") == (False, False, False)
    assert outcome_of(Slo(1.0, 0.1), None, 0.9, outcome="abort") is None
    assert outcome_of(Slo(1.0, 0.1), 0.9, 1.0, outcome="abort") == (True, True, True)
