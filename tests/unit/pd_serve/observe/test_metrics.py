"""Metrics that are counted from the events of the recorder."""

from prometheus_client import REGISTRY

from migration.errors import Refusal, RefusalCode
from pd_serve.observe.metrics import RequestMetrics
from pd_serve.observe.recorder import RequestRecorder
from router.request import NewRequest
from router.slo import NO_SLO, Slo
from tests.members import instance_info
from tests.unit.pd_serve.made_migrations import migrated


def test_an_aborted_migration_is_counted_with_its_code() -> None:
    def counted(code: str) -> float:
        labels = {"reason": "balance", "code": code}
        return REGISTRY.get_sample_value("pd_serve_aborted_migrations_total", labels) or 0.0

    before = counted("no_free_blocks")
    recorder = RequestRecorder([RequestMetrics()])
    recorder.issued("r", 10.0, NewRequest(100))

    full = Refusal(RefusalCode.NO_FREE_BLOCKS, "refused: no 3 free KV blocks")
    recorder.migrated(migrated("r", reason="balance", refusal=full), 11.0)
    recorder.migrated(migrated("r", reason="balance"), 12.0)

    assert counted("no_free_blocks") == before + 1


def test_bytes_of_a_committed_migration_are_counted_by_pair_of_nodes() -> None:
    def counted(source: str, destination: str) -> float:
        labels = {"source_node": source, "destination_node": destination}
        return REGISTRY.get_sample_value("pd_serve_node_migrated_bytes_total", labels) or 0.0

    recorder = RequestRecorder([RequestMetrics()])
    for instance, node in (("p0", "left"), ("d0", "right")):
        recorder.instance_joined(instance_info(instance, node=node))
    recorder.issued("r", 10.0, NewRequest(100))

    full = Refusal(RefusalCode.NO_FREE_BLOCKS, "refused: no 3 free KV blocks")
    recorder.migrated(migrated("r", bytes_copied=30), 11.0)
    recorder.migrated(migrated("r", bytes_copied=12), 12.0)
    recorder.migrated(migrated("r", bytes_copied=7, refusal=full), 13.0)

    assert (counted("left", "right"), counted("right", "left")) == (42, 0)


def test_dispatches_are_counted_from_the_time_an_instance_joins_until_it_leaves() -> None:
    def counted() -> float | None:
        return REGISTRY.get_sample_value("pd_serve_dispatches_total", {"instance": "p7"})

    recorder = RequestRecorder([RequestMetrics()])
    seen = [counted()]
    recorder.instance_joined(instance_info("p7"))
    seen.append(counted())
    recorder.issued("r", 10.0, NewRequest(100))
    recorder.dispatched("r", "p7", "prefill", 10.0)
    seen.append(counted())
    recorder.instance_left("p7")
    seen.append(counted())

    assert seen == [None, 0, 1, None]


def test_requests_with_targets_are_counted_by_what_they_met() -> None:
    def counted() -> list[float]:
        values = [REGISTRY.get_sample_value("pd_serve_slo_requests_total")]
        for target in ("ttft", "itl", "all"):
            values.append(REGISTRY.get_sample_value("pd_serve_slo_met_requests_total", {"target": target}))
        return [value or 0.0 for value in values]

    before = counted()
    recorder = RequestRecorder([RequestMetrics()])
    for name, slo in (("good", Slo(1.0, 0.2)), ("slow", Slo(1.0, 0.05)), ("none", NO_SLO)):
        recorder.issued(name, 10.0, NewRequest(100, slo=slo))
        recorder.dispatched(name, "p0", "prefill", 10.0)
        recorder.first_token_from(name, "p0", "prefill", 10.5)
        recorder.ended(name, "stop", 11.5, tokens=11)

    assert [now - then for now, then in zip(counted(), before, strict=True)] == [2, 2, 1, 1]
