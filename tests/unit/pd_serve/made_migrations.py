"""Records of finished migrations for tests."""

from typing import Any

from migration.errors import Refusal, RefusalCode
from migration.messages import InstanceId, RequestId
from migration.record import MigrationRecord

FULL = Refusal(RefusalCode.NO_FREE_BLOCKS, "full")


def migrated(
    request_id: str = "r",
    source: str = "p0",
    destination: str = "d0",
    reason: str = "handoff",
    refusal: Refusal | None = None,
    **more: Any,
) -> MigrationRecord:
    """A committed migration, or with `refusal` an aborted one."""
    return MigrationRecord(
        request_id=RequestId(request_id),
        source=InstanceId(source),
        destination=InstanceId(destination),
        reason=reason,
        refusal=refusal,
        **more,
    )
