"""A process that obeys over a pipe."""

from multiprocessing.connection import Connection

import pytest

from loadtests.bench.step_clock import RecordedStep
from loadtests.bench.step_engines import EngineProcess, serve


def run_adder(pipe: Connection, first: int) -> None:
    pipe.send(f"adds to {first}")
    serve(pipe, {"add": lambda number: first + number, "take": lambda: [(2, 2, 3.0, 2.0, 2.5)]})


def run_and_die(pipe: Connection) -> None:
    pipe.send(None)
    pipe.recv()


async def test_commands_are_carried_out_in_the_process() -> None:
    engine = EngineProcess(run_adder, 40)
    try:
        assert await engine.start() == "adds to 40"
        assert await engine.ask("add", 2) == 42
        assert await engine.take() == [RecordedStep(2, 2, 3.0, 2.0, 2.5)]
    finally:
        await engine.stop()


async def test_a_process_that_has_died_is_an_error() -> None:
    engine = EngineProcess(run_and_die)
    await engine.start()
    with pytest.raises(EOFError):
        await engine.ask("add", 2)
    await engine.stop()
