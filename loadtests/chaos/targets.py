"""Which processes of a service a fault can affect, and how often each kind is chosen."""

import random
from collections.abc import Mapping
from typing import Any

import psutil

from loadtests.chaos.schedule import FaultRates, Target
from loadtests.processes import ProcessKind
from loadtests.started_service import ClusterShape, StartedService

#: The manager of `pd-serve serve` is frozen, and not killed: everything ends with it.
SERVE_RATES = FaultRates(
    kill={
        Target.PREFILL: 2,
        Target.DECODE: 4,
        Target.NEUTRAL: 4,
        Target.SCHEDULER: 2,
        Target.API_SERVER: 1,
    },
    freeze={
        Target.PREFILL: 2,
        Target.DECODE: 3,
        Target.NEUTRAL: 3,
        Target.SCHEDULER: 1,
        Target.MANAGER: 1,
        Target.API_SERVER: 1,
        Target.RAYLET: 1,
    },
    longest_freeze_s={Target.RAYLET: 5.0},  # Ray ends a node that is silent for longer
)

RAY_SERVE_RATES = FaultRates(
    kill={
        Target.PREFILL: 2,
        Target.DECODE: 4,
        Target.NEUTRAL: 4,
        Target.SCHEDULER: 2,
        Target.MANAGER: 2,
        Target.API_SERVER: 2,
        Target.RAYLET: 0.5,
    },
    freeze={
        Target.PREFILL: 2,
        Target.DECODE: 3,
        Target.NEUTRAL: 3,
        Target.SCHEDULER: 1,
        Target.MANAGER: 2,
        Target.API_SERVER: 2,
        Target.RAYLET: 0.5,
    },
    longest_freeze_s={Target.RAYLET: 5.0},
)

_KINDS = {
    Target.SCHEDULER: ProcessKind.SCHEDULER,
    Target.MANAGER: ProcessKind.MANAGER,
    Target.API_SERVER: ProcessKind.API_SERVER,
    Target.RAYLET: ProcessKind.RAYLET,
}


def rates_of(shape: ClusterShape) -> FaultRates:
    """The weights of faults and the numbers of processes, without kinds that a cluster does not have."""
    rates = RAY_SERVE_RATES if shape.under_ray_serve else SERVE_RATES

    def present(weights: Mapping[Target, float]) -> dict[Target, float]:
        return {
            target: weight
            for target, weight in weights.items()
            if not target.is_instance or shape.instances.get(target.value)
        }

    numbers = {target: shape.instances.get(target.value, 0) for target in Target if target.is_instance}
    numbers[Target.API_SERVER] = shape.api_servers
    return FaultRates(present(rates.kill), present(rates.freeze), rates.longest_freeze_s, numbers)


def candidates(
    service: StartedService, target: Target, cluster: Mapping[str, Any]
) -> list[tuple[str, psutil.Process]]:
    """(name, process) of the living processes that a fault can affect.

    Args:
        cluster: The last body of `GET /cluster`.
    """
    if target.is_instance:
        alive = {process.pid: process for process in service.processes.of_kind(ProcessKind.INSTANCE)}
        return [
            (row["id"], alive[row["pid"]])
            for row in cluster.get("instances", ())
            if row["role"] == target.value and row["pid"] in alive and row["state"] != "starting"
        ]
    found = service.processes.of_kind(_KINDS[target])
    if target is Target.RAYLET and service.shape.under_ray_serve:
        head = {process.pid for process in psutil.Process(service.head).children(recursive=True)}
        found = [process for process in found if process.pid not in head]
    return [(target.value, process) for process in found]


def choose(
    service: StartedService,
    target: Target,
    cluster: Mapping[str, Any],
    dice: random.Random,
    taken: set[int],
) -> tuple[str, psutil.Process] | None:
    """One of the candidates that is not taken yet; None if there is none."""
    found = [one for one in candidates(service, target, cluster) if one[1].pid not in taken]
    return dice.choice(found) if found else None
