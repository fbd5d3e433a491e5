"""The campaign finds bugs that are put into the product on purpose."""

import pytest

from pd_serve.simulation.faults.draw import draw
from pd_serve.simulation.faults.run import run
from tests.unit.pd_serve.simulation.faults.mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_bug_is_found_by_the_first_seed_that_shows_it(mutation: Mutation) -> None:
    with mutation.applied():
        findings = run(draw(mutation.seed, mutation.tier)).findings

    assert any(mutation.finding in finding for finding in findings), findings
