"""What the processes of a cluster say of the same requests, compared."""

import asyncio
from collections.abc import Sequence

from migration.engine_interface import HeldBlocks
from migration.messages import InstanceId, RequestId
from pd_serve.comm.requests import Holdings
from pd_serve.comm.timing import INTEGRITY_INTERVAL_S, INTEGRITY_LOOK_S
from pd_serve.errors import EngineDeadError
from pd_serve.frontend.integrity import IntegrityWatch, compare_holdings, lost, without_client
from tests.virtual_time import in_virtual_time

R, S = RequestId("r"), RequestId("s")


def held(*requests: str, arriving: Sequence[str] = (), leaving: Sequence[tuple[str, str]] = ()) -> Holdings:
    return Holdings(
        [HeldBlocks(RequestId(r), 3, False) for r in requests]
        + [HeldBlocks(RequestId(r), 3, True) for r in arriving],
        [(RequestId(r), InstanceId(to), "balance") for r, to in leaving],
    )


def test_a_request_that_its_api_server_does_not_know_is_found() -> None:
    assert without_client({"d0": [R, S], "d1": [R]}, {R: "d0"}) == {"d0": [S]}


def test_a_request_that_no_instance_has_is_found_unless_it_waits_for_one() -> None:
    assert lost({"d0": [R], "d1": []}, {R: "d1", S: "d1"}) == [S]
    assert lost({"d0": []}, {S: ""}) == []


def test_a_request_on_two_instances_is_found_unless_it_is_being_moved() -> None:
    assert compare_holdings({"d0": held("r"), "d1": held("r", "s")}) == [
        "d0 and d1 hold r, which is not being moved"
    ]
    assert compare_holdings({"d0": held("r", leaving=[("r", "d1")]), "d1": held("r")}) == []


def test_blocks_reserved_for_a_request_that_no_instance_sends_are_found() -> None:
    arriving = held(arriving=["r"])
    assert compare_holdings({"d0": held("r", leaving=[("r", "d1")]), "d1": arriving}) == []
    for others in ({}, {"d0": held("r")}, {"d0": held("r", leaving=[("r", "d2")])}):
        assert compare_holdings({**others, "d1": arriving}) == [
            "d1: 3 blocks are held for r, which no instance sends"
        ]


class Looks:
    """Each look finds what a test has said; the results of checks."""

    def __init__(self, *found: list[str]) -> None:
        self.found = list(found)
        self.results: list[list[str]] = []
        self.watch = IntegrityWatch(self.look, self.results.append)

    async def look(self) -> list[str]:
        found = self.found.pop(0) if self.found else []
        if "dead" in found:
            raise EngineDeadError("d0 has died")
        return found


@in_virtual_time
async def test_only_a_violation_that_lasts_is_one() -> None:
    looks = Looks(["a", "b"], ["b", "c"], ["c", "b"])
    assert await looks.watch.check() == ["b"]
    assert await Looks(["a"], ["b"], ["a"]).watch.check() == []


@in_virtual_time
async def test_the_check_runs_every_minute_and_also_after_one_that_an_instance_did_not_answer() -> None:
    looks = Looks(["dead"], ["a"], ["a"], ["a"])
    running = asyncio.create_task(looks.watch.run())
    await asyncio.sleep(3 * INTEGRITY_INTERVAL_S + 2 * INTEGRITY_LOOK_S + 1)
    running.cancel()
    assert looks.results == [["a"], []]
