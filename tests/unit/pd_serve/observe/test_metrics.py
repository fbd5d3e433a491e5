"""Metrics of migrations, from what the recorder tells."""

from prometheus_client import REGISTRY

from migration.errors import Refusal, RefusalCode
from pd_serve.observe.metrics import RequestMetrics
from pd_serve.observe.recorder import RequestRecorder
from router.request import NewRequest
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
