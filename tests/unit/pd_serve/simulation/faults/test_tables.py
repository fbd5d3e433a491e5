"""Entries of tables that name what is gone."""

import asyncio
from collections import deque

from migration.tasks import BackgroundTasks
from pd_serve.frontend.token_ledger import TokenLedger
from pd_serve.simulation.faults.tables import num_tasks, remains
from pd_serve.simulation.virtual_time import VirtualLoop
from router.load import InstanceLoad
from router.projected_loads import ProjectedLoads


def test_the_tasks_of_all_objects_are_counted() -> None:
    async def count() -> list[int]:
        class Part:
            __module__ = "pd_serve.test"

            def __init__(self) -> None:
                self.tasks = BackgroundTasks()
                self.parts: list[Part] = []

        root = Part()
        root.parts.append(Part())
        root.tasks.start(asyncio.sleep(1.0))
        root.parts[0].tasks.start(asyncio.sleep(2.0))
        counts = [num_tasks(root)]
        await asyncio.sleep(1.5)
        counts.append(num_tasks(root))
        await asyncio.sleep(1.0)
        return counts

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(count()) == [2, 1]


def is_gone(text: str) -> bool:
    return text.startswith("gone")


def load(name: str) -> InstanceLoad:
    return InstanceLoad(instance_id=name, role="neutral", total_blocks=10, free_blocks=10)


#: What a load report leaves.
REPORTED = {f"ProjectedLoads.{table}" for table in ("_reports", "_reported_at", "_projected", "_outdated")}


def test_entries_of_tables_in_tables_are_found() -> None:
    loads = ProjectedLoads()
    loads.report(load("a"))
    assert list(remains(loads, is_gone)) == []

    loads.expect("a", "gone-request", 3)
    assert list(remains(loads, is_gone)) == ["ProjectedLoads._arrivals has 'gone-request'"]

    loads.settled("a", "gone-request")
    loads.report(load("gone-instance"))
    places = {line.partition(" has")[0] for line in remains(loads, is_gone)}
    assert places == REPORTED


def test_objects_in_tables_and_behind_methods_are_looked_into() -> None:
    class Root:
        __module__ = "pd_serve.test"

        def __init__(self) -> None:
            ledger = TokenLedger("a")
            ledger._early = {0: (1, deque(["gone"]))}  # type: ignore[dict-item]
            self.ledgers = {"r": [ledger]}
            other = ProjectedLoads()
            other.report(load("gone-instance"))
            self.method = other.report

    places = {line.partition(" has")[0] for line in remains(Root(), is_gone)}
    assert places == {"TokenLedger._early", *REPORTED}


def test_single_texts_and_kept_tables_are_no_remains() -> None:
    ledger = TokenLedger("gone-owner")
    assert list(remains(ledger, is_gone)) == []

    loads = ProjectedLoads()
    loads.report(load("gone"))
    kept = tuple(REPORTED)
    assert list(remains(loads, is_gone, kept)) == []
