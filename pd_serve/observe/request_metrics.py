"""Metrics of requests and their migrations, from what the recorder tells."""

from collections.abc import Mapping

from pd_serve.observe import metrics
from pd_serve.observe.recorder import Observer
from pd_serve.observe.timeline import ObservedMigration, Stage, Stay, Timeline


class RequestMetrics(Observer):
    """Counts in the process's registry. There is one for each process."""

    def dispatched(self, request: Timeline, stay: Stay) -> None:
        metrics.DISPATCHES.labels(stay.instance).inc()

    def first_token(self, request: Timeline) -> None:
        assert request.first_token_at is not None
        metrics.TTFT.observe(request.first_token_at - request.issued_at)

    def stage(self, request: Timeline, stage: Stage) -> None:
        metrics.STAGE.labels(stage.name).observe(stage.seconds)

    def migrated(self, request: Timeline, migration: ObservedMigration) -> None:
        record, reason = migration.record, migration.record.reason
        metrics.MIGRATIONS.labels(reason, record.outcome).inc()
        if record.refusal is not None:
            metrics.ABORTED_MIGRATIONS.labels(reason, record.refusal.code).inc()
            return
        metrics.MIGRATED_BLOCKS.labels(reason).inc(record.blocks)
        metrics.MIGRATED_BYTES.labels(reason).inc(record.bytes_copied)
        metrics.MIGRATION_DURATION.labels(reason).observe(record.duration_s)
        metrics.MIGRATION_STAGES.labels(reason).observe(record.stages)
        for number, copy in enumerate(record.copies, 1):
            kind = "tail" if number == len(record.copies) else "live"
            metrics.STAGE_DURATION.labels(kind).observe(copy.end_s - copy.begin_s)

    def downtime(self, request: Timeline, migration: ObservedMigration) -> None:
        assert migration.downtime_s is not None
        metrics.DOWNTIME.labels(migration.record.reason).observe(migration.downtime_s)

    def lost(self, request: Timeline, instance: str) -> None:
        metrics.RECOMPUTED.inc()

    def ended(self, request: Timeline) -> None:
        assert request.ended_at is not None
        metrics.REQUESTS.labels(request.outcome).inc()
        metrics.DURATION.labels(request.outcome).observe(request.ended_at - request.issued_at)
        if request.output_tokens > 1:
            metrics.LONGEST_GAP.observe(request.longest_gap_s)

    def token_gaps(self, gaps: Mapping[float, int]) -> None:
        for gap_s, count in gaps.items():
            metrics.ITL.observe(gap_s, count)
