"""The part of `bench simulator` in which the engines of the service are simulated, too.

All else is real: processes, sockets, Ray, HTTP. Engines that wait instead of computing leave the cores to the
rest, as engines on GPUs do, so that this shows how close the simulation of dispatch, hand-offs and migrations
is, on a machine that has too few cores for engines that compute.
"""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import rich.console

from loadtests.bench.clients import run_checked_round
from loadtests.bench.fidelity import RealRound, compared
from loadtests.bench.load import Lengths, Load
from loadtests.servers import MODEL, SharedSettings, free_port, running
from loadtests.terminal import new_progress
from pd_serve.config import ServeConfig
from pd_serve.simulated_engine.cost_model import COST_MODELS, LinearCostModel
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulation.config import NetworkSettings

#: Pause before each round, in seconds.
SETTLE_S = 0.5

LAYOUTS: tuple[dict[str, int], ...] = ({"neutral": 4}, {"prefill": 2, "decode": 4})

#: Steps of some 45 ms.
COST_MODEL = "a10-llama-7b"

#: Requests/s that keep about nine requests in the batch of each engine that decodes.
RATE = 5.0
LENGTHS = Lengths(prompt=(32, 768), output=(32, 256))
WARM_UP = Load("warm-up", 20, LENGTHS, rate=RATE)
ALONE = Load("alone", 8, Lengths(prompt=(32, 768), output=(16, 32)), num_clients=1)

#: Copies between these engines have eight bytes for a block.
NETWORK = NetworkSettings(kv_latency_s=0.001, kv_bytes_per_s=1e12)


def engines(model: LinearCostModel | None = None) -> dict[str, EngineSettings]:
    """The engines of `pd-serve serve`, perhaps with other durations of steps."""
    engine = ServeConfig(engine="simulated", cost_model=COST_MODEL).simulated
    assert engine is not None
    return {"neutral": engine if model is None else replace(engine, cost_model=model)}


async def compare(
    layout: dict[str, int], num_rounds: int, num_requests: int, console: rich.console.Console
) -> dict[str, Any]:
    """Numbers of one layout, real and simulated.

    Raises:
        PdServeError: A server did not start, or a request failed.
    """
    flags = ["--engine=simulated", f"--cost-model={COST_MODEL}"]
    service = SharedSettings(MODEL, flags, {}).ours(layout, free_port())
    load = Load("lengths", num_requests, LENGTHS, rate=RATE)
    rounds = []
    async with AsyncExitStack() as stack:
        with console.status("starting pd-serve"):
            server = await stack.enter_async_context(running(service))
        progress = stack.enter_context(new_progress(console))
        task = progress.add_task("requests to simulated engines", total=num_rounds)
        await run_checked_round(server, WARM_UP, seed=num_rounds)
        for seed in range(num_rounds):
            progress.update(task, completed=seed, refresh=True)
            alone = await run_checked_round(server, ALONE, seed)
            await asyncio.sleep(SETTLE_S)
            measured = await run_checked_round(server, load, seed)
            rounds.append(RealRound(load, measured, ALONE, alone.outcomes, COST_MODELS[COST_MODEL]))
    return {"cost_model": COST_MODEL} | await compared(layout, rounds, engines, NETWORK)
