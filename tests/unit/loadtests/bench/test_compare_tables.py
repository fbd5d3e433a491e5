"""The tables of the comparison."""

from loadtests.bench import compare_tables
from loadtests.bench.arms import PLAIN
from loadtests.bench.rounds import Round, summarize_rounds
from tests.unit.loadtests.bench.made_outcomes import made_outcome


def test_a_missing_number_is_shown_as_a_dash() -> None:
    failed = summarize_rounds([Round(1.0, 0.1, 1.0, [made_outcome(error="503")])])
    found = {"arms": {PLAIN: {"title": "plain", "figures": {"steady": failed}}}}

    table = compare_tables.arms(2, found)

    assert table.row_count == 1
    assert next(iter(table.columns[2].cells)) == "– / –"
