"""The actors of instances on the simulated platform."""

import asyncio

from pd_serve.manager.launcher import ManagerNotes
from pd_serve.simulated_engine.faults import EngineFaults
from pd_serve.simulation.faults.actors import SimulatedActor
from pd_serve.simulation.faults.process_loop import ProcessLoop


def test_an_actor_keeps_the_latest_notes_and_a_suspended_one_when_it_goes_on() -> None:
    loop = ProcessLoop()
    process = loop.spawn("decode-0")
    actor = SimulatedActor("decode-0", process, EngineFaults())

    async def give(*terms: int) -> None:
        for term in terms:
            process.call_soon(actor.keep, ManagerNotes(term=term))
        await asyncio.sleep(1.0)

    loop.run_until_complete(give(5, 4))
    assert actor.notes == ManagerNotes(term=5)

    process.suspend()
    loop.run_until_complete(give(6))
    assert actor.notes == ManagerNotes(term=5)

    process.resume()
    loop.run_until_complete(give())
    assert actor.notes == ManagerNotes(term=6)
    loop.close()
