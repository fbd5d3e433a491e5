"""Draws faults of tier 4: single messages and orders that are lost, and several things at the same moment."""

from typing import get_args

from msgspec.structs import replace

from pd_serve.comm.messages import ToApiServer, ToInstance, ToManager, ToScheduler
from pd_serve.comm.timing import START_TIMEOUT_S
from pd_serve.simulation.faults.draw_faults import FAULTS_S, Dice, duration, operation
from pd_serve.simulation.faults.schedule import FaultKind, FaultyClusterShape, ScheduledFault

_CHANNELS = (ToInstance, ToApiServer, ToManager, ToScheduler)

#: Types of all messages between processes.
MESSAGES = tuple(
    dict.fromkeys([kind.__name__ for channel in _CHANNELS for kind in get_args(channel)] + ["Tokens"])
)

#: Messages of operations, scaling and membership.
CONTROL = (
    *("Call", "Answer", "SetDraining", "SetRole", "MoveOut", "StartInstance", "StopInstance"),
    *("SchedulerReport", "Membership", "Join"),
)

#: Messages that are about one request.
ABOUT_REQUESTS = (
    *("AddRequest", "Offer", "Pull", "Stage", "Final", "Committed", "MigrationEnded", "HandOff"),
    *("AbortRequests", "Query", "Confirmed", "Withdraw"),
)


def rare_shape(dice: Dice, shape: FaultyClusterShape) -> FaultyClusterShape:
    """Each process on its own, clients that come back in any case, and half of the pools scale quickly."""
    shape = replace(
        shape,
        one_process=False,
        comes_back=shape.comes_back or dice.random() < 0.5,
        orphan_s=shape.orphan_s or dice.choice((0.0, 0.0, 5.0)),
    )
    if dice.random() < 0.5:
        return shape
    scaling: dict[str, str | float] = {
        "scaling": dice.choice(("freeness", "work")),
        "prefill_scaling": dice.choice(("busy", "work", "backlog")),
        "scale_interval_s": dice.choice((0.5, 2.0)),
        "drain_after_s": dice.choice((0.0, 3.0)),
        "forecast_s": dice.choice((0.0, 20.0)),
    }
    if "decode" in shape.instances and dice.random() < 0.2:
        scaling["roles"] = True
    bounds = {role: (1, count + 2) for role, count in shape.instances.items()}
    return replace(shape, autoscale=bounds, settings=shape.settings | scaling)


def rare(dice: Dice, shape: FaultyClusterShape, requests: int) -> list[ScheduledFault]:
    """One of the kinds below, at a time that is drawn."""
    at_s = dice.uniform(*FAULTS_S)
    match dice.randrange(10):
        case 0 | 1:
            return _lost(dice, at_s, shape, requests)
        case 2:
            return _during_control(dice, shape, requests)
        case 3:
            return _at_once(dice, at_s, requests)
        case 4:
            target = dice.choice((f"api:{dice.randrange(3)}", "manager", f"owner:{dice.randrange(requests)}"))
            return [ScheduledFault(at_s, FaultKind.HANG, target, on=dice.choice(("", "", *ABOUT_REQUESTS)))]
        case 5 | 6:
            return _around_request(dice, at_s)
        case 7:
            return _overtaken(dice, at_s, requests)
        case 8:
            return _platform(dice, at_s)
        case _:
            return _operations(dice, at_s, shape, requests)


def _lost(dice: Dice, at_s: float, shape: FaultyClusterShape, requests: int) -> list[ScheduledFault]:
    """The next messages of a type are lost, as when a connection is reset, perhaps those of an operation."""

    def lose(at_s: float, kind: str) -> ScheduledFault:
        count, for_s = float(dice.randrange(1, 5)), dice.uniform(5.0, 60.0)
        return ScheduledFault(at_s, FaultKind.LOSE_NEXT, other=kind, for_s=for_s, value=count)

    if dice.random() < 0.5:
        operations = operation(dice, shape, requests)
        return [lose(operations[0].at_s - 0.01, dice.choice(CONTROL)), *operations]
    return [lose(at_s + dice.random(), dice.choice(MESSAGES)) for _ in range(dice.choice((1, 1, 2)))]


def _operations(dice: Dice, at_s: float, shape: FaultyClusterShape, requests: int) -> list[ScheduledFault]:
    """Several operations that begin at the same moment."""
    faults = []
    for _ in range(dice.randrange(2, 5)):
        drawn = operation(dice, shape, requests)
        faults += [replace(fault, at_s=at_s + fault.at_s - drawn[0].at_s) for fault in drawn]
    return faults


def _during_control(dice: Dice, shape: FaultyClusterShape, requests: int) -> list[ScheduledFault]:
    """A process dies, or stands still, when it sends or receives a message of an operation."""
    operations = operation(dice, shape, requests)
    at_s = operations[0].at_s - 0.01
    end, on = dice.choice(("sender", "receiver")), dice.choice(CONTROL)
    if dice.random() < 0.6:
        return [ScheduledFault(at_s, FaultKind.KILL, end, on=on), *operations]
    return [ScheduledFault(at_s, FaultKind.FREEZE, end, for_s=duration(dice), on=on), *operations]


def _at_once(dice: Dice, at_s: float, requests: int) -> list[ScheduledFault]:
    """Two or three processes of different kinds die, or stand still, at the same moment."""
    kinds = [f"api:{dice.randrange(3)}", "manager", "scheduler", f"instance:{dice.randrange(8)}"]
    targets = dice.sample([*kinds, f"owner:{dice.randrange(requests)}"], dice.randrange(2, 4))
    lasts_s = duration(dice)
    return [
        ScheduledFault(at_s, FaultKind.KILL, target)
        if dice.random() < 0.6
        else ScheduledFault(at_s, FaultKind.FREEZE, target, for_s=lasts_s)
        for target in targets
    ]


def _around_request(dice: Dice, at_s: float) -> list[ScheduledFault]:
    """The client of a request leaves at a stage of it, or its API server dies, or it loses its blocks."""
    on = dice.choice(ABOUT_REQUESTS)
    leaves = ScheduledFault(at_s, FaultKind.ABORT, "request", on=on)
    match dice.randrange(4):
        case 0:
            return [ScheduledFault(at_s, FaultKind.KILL, "server", on=on)]
        case 1:
            return [ScheduledFault(at_s, FaultKind.PREEMPT, dice.choice(("sender", "receiver")), on=on)]
        case 2:
            end = dice.choice(("sender", "receiver"))
            return [leaves, ScheduledFault(at_s, FaultKind.FREEZE, end, for_s=duration(dice), on=on)]
        case _:
            return [leaves, replace(leaves, on=dice.choice(ABOUT_REQUESTS))]


def _overtaken(dice: Dice, at_s: float, requests: int) -> list[ScheduledFault]:
    """The client of a lost request leaves before the engine of another instance has it."""
    request, waits_s = dice.randrange(requests), dice.uniform(0.1, 3.0)
    slow = [
        ScheduledFault(at_s, FaultKind.SLOW_CALL, f"instance:{number}", "add", for_s=6.0, value=waits_s)
        for number in range(5)
    ]
    kill = ScheduledFault(at_s + 0.05, FaultKind.KILL, f"owner:{request}")
    leaves_s = at_s + dice.uniform(0.05, waits_s + 1.5)
    return [*slow, kill, ScheduledFault(leaves_s, FaultKind.ABORT, value=float(request))]


def _platform(dice: Dice, at_s: float) -> list[ScheduledFault]:
    """The platform loses an order of a manager, or has no resources until starts are given up."""
    instance = f"instance:{dice.randrange(8)}"
    kill = ScheduledFault(at_s + 0.1, FaultKind.KILL, instance)
    match dice.randrange(8):
        case 0:
            return [ScheduledFault(at_s, FaultKind.LOSE_STARTS, value=1.0), kill]
        case 1:
            return [ScheduledFault(at_s, FaultKind.STARVE, for_s=START_TIMEOUT_S + 60 * dice.random()), kill]
        case 2:
            late_s = START_TIMEOUT_S + dice.uniform(-5.0, 5.0)
            return [ScheduledFault(at_s, FaultKind.SLOW_START, for_s=30.0, value=late_s), kill]
        case _:
            lost = ScheduledFault(at_s, FaultKind.LOSE_STOPS, value=float(dice.choice((1, 1, 2))))
            ends = [
                ScheduledFault(at_s + 0.1, FaultKind.DRAIN_STOP, instance),
                ScheduledFault(at_s + 0.1, FaultKind.FREEZE, instance, for_s=dice.uniform(31.0, 60.0)),
                ScheduledFault(at_s + 0.1, FaultKind.RESTART),
            ]
            return [lost, dice.choice(ends)]
