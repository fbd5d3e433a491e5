"""Refusals carry a code; every code is in use."""

from pathlib import Path

import pytest

from migration.errors import DestinationRefusedError, PeerLostError, Refusal, RefusalCode, SourceGoneError

ROOT = Path(__file__).parents[3]


def test_every_code_is_raised_somewhere_in_the_product() -> None:
    sources = "".join(
        path.read_text(encoding="utf-8")
        for package in ("migration", "pd_serve")
        for path in (ROOT / package).rglob("*.py")
    )

    assert [code.name for code in RefusalCode if f"RefusalCode.{code.name}" not in sources] == []


@pytest.mark.parametrize("kind", [DestinationRefusedError, SourceGoneError])
def test_an_error_is_its_refusal_as_an_exception(
    kind: type[DestinationRefusedError | SourceGoneError],
) -> None:
    error = kind(RefusalCode.NO_FREE_BLOCKS, "no 3 free KV blocks")

    assert str(error) == "no 3 free KV blocks"
    assert error.refusal == Refusal(RefusalCode.NO_FREE_BLOCKS, "no 3 free KV blocks")


def test_a_lost_peer_has_one_code() -> None:
    assert PeerLostError("d0 died").refusal == Refusal(RefusalCode.PEER_LOST, "d0 died")


def test_the_other_side_of_a_migration_keeps_the_code() -> None:
    refusal = Refusal(RefusalCode.NO_BATCH_SLOT, "all 2 slots are taken").prefixed("refused")

    assert refusal == Refusal(RefusalCode.NO_BATCH_SLOT, "refused: all 2 slots are taken")
