"""Draws faults of each kind: of processes, of links, and operations by hand."""

import random

from pd_serve.simulation.faults.schedule import FaultKind, FaultyClusterShape, ScheduledFault

#: Faults begin within this time after the cluster is ready.
FAULTS_S = (1.0, 14.0)

#: Messages of a migration, at which faults happen precisely.
STAGES = ("AddRequest", "Offer", "Pull", "Stage", "Final", "Committed", "Tokens", "MigrationEnded")

#: Messages of a prefix copy.
PREFIX_STAGES = ("PrefixAsk", "PrefixOffer", "PrefixRead", "PrefixConfirmed")

Dice = random.Random


def orphaned(dice: Dice, requests: int) -> list[ScheduledFault]:
    """An API server dies, and perhaps the instance of one of its requests soon before or after."""
    at_s = dice.uniform(*FAULTS_S)
    deaths = [ScheduledFault(at_s, FaultKind.KILL, f"api:{dice.randrange(3)}")]
    if dice.random() < 0.5:
        owner = f"owner:{dice.randrange(requests)}"
        deaths.append(ScheduledFault(max(0.0, at_s + dice.uniform(-2.0, 4.0)), FaultKind.KILL, owner))
    if dice.random() < 0.3:
        deaths.append(
            ScheduledFault(at_s + dice.uniform(0.0, 6.0), FaultKind.KILL, f"api:{dice.randrange(3)}")
        )
    return deaths


def duration(dice: Dice) -> float:
    """From 0.1 to 60 s, as often below as above 2.4 s."""
    return float(0.1 * 600 ** dice.random())


def a_process(dice: Dice, shape: FaultyClusterShape, requests: int, *, killed: bool = False) -> str:
    found = [f"instance:{dice.randrange(8)}", f"owner:{dice.randrange(requests)}", "scheduler"]
    found += [f"{dice.choice(list(shape.instances))}:{dice.randrange(4)}"]
    if not (killed and shape.one_process):
        found += ["manager", f"api:{dice.randrange(3)}"]
    return dice.choice(found)


def single(dice: Dice, shape: FaultyClusterShape, requests: int) -> list[ScheduledFault]:
    """One fault of a process, its memory, its clock or its clients, perhaps in the middle of a migration."""
    at_s = dice.uniform(*FAULTS_S)
    on, process = "", a_process(dice, shape, requests)
    if dice.random() < 0.4:
        on = dice.choice(PREFIX_STAGES if shape.policy == "conditional" and dice.random() < 0.5 else STAGES)
    instance = dice.choice((f"instance:{dice.randrange(8)}", f"owner:{dice.randrange(requests)}"))
    match dice.randrange(20):
        case 0 | 1 | 2 | 3:
            target = a_process(dice, shape, requests, killed=True)
            if on and dice.random() < 0.7 and not shape.one_process:
                target = dice.choice(("sender", "receiver"))
            return [ScheduledFault(at_s, FaultKind.KILL, target, on=on)]
        case 4 | 5 | 6 | 7:
            target = dice.choice(("sender", "receiver")) if on and dice.random() < 0.5 else process
            freeze = ScheduledFault(at_s, FaultKind.FREEZE, target, for_s=duration(dice), on=on)
            if dice.random() < 0.2:
                return [ScheduledFault(at_s, FaultKind.HANG, dice.choice((instance, "scheduler")), on=on)]
            return [freeze]
        case 8:
            jump = ScheduledFault(at_s, FaultKind.CLOCK, process, value=duration(dice))
            return [_wall_jump(dice, at_s, dice.choice((process, ""))) if dice.random() < 0.3 else jump]
        case 9:
            return [ScheduledFault(at_s, FaultKind.STALL_READS, instance, for_s=duration(dice), on=on)]
        case 10:
            return [ScheduledFault(at_s, FaultKind.FAIL_READS, instance, for_s=duration(dice), on=on)]
        case 11:
            return [ScheduledFault(at_s, FaultKind.FLIP, instance)]
        case 12:
            call = dice.choice(("reserve", "grow", "commit"))
            return [ScheduledFault(at_s, FaultKind.REFUSE, instance, call)]
        case 13:
            call = dice.choice(("add", "abort", "describe", "resume", "release", "reserve", "commit", "drop"))
            seconds = min(10.0, duration(dice))
            return [ScheduledFault(at_s, FaultKind.SLOW_CALL, instance, call, for_s=5.0, value=seconds)]
        case 14:
            return [ScheduledFault(at_s, FaultKind.PREEMPT, instance, on=on)]
        case 15:
            aborted = float(dice.randrange(requests))
            return [ScheduledFault(at_s, FaultKind.ABORT, value=aborted, on=on)]
        case 16:
            peer = a_process(dice, shape, requests)
            both = float(dice.choice((1, 2)))
            return [ScheduledFault(at_s, FaultKind.CUT, process, peer, duration(dice), both, on)]
        case 17:
            return [
                ScheduledFault(
                    at_s, FaultKind.DELAY, process, for_s=duration(dice), value=dice.uniform(0.01, 1.0)
                )
            ]
        case 18 if dice.random() < 0.5:
            return [ScheduledFault(at_s, FaultKind.STEP, instance, for_s=duration(dice))]
        case 18:
            return [ScheduledFault(at_s, FaultKind.POISON, value=float(dice.randrange(requests)))]
        case _:
            faults = _start(dice, at_s, instance)
            return faults if shape.one_process or dice.random() < 0.8 else _blackout(dice, shape, at_s)


def _start(dice: Dice, at_s: float, instance: str) -> list[ScheduledFault]:
    """An instance dies, and another one does not come as it should."""
    kill = ScheduledFault(at_s, FaultKind.KILL, instance)
    match dice.randrange(4):
        case 0:
            return [ScheduledFault(at_s - 0.1, FaultKind.DIES_EARLY, value=float(dice.randrange(1, 4))), kill]
        case 1:
            return [
                ScheduledFault(at_s - 0.1, FaultKind.FAILED_START, value=float(dice.randrange(1, 4))),
                kill,
            ]
        case 2:
            seconds = dice.uniform(5.0, 60.0)
            return [ScheduledFault(at_s - 0.1, FaultKind.SLOW_START, for_s=60.0, value=seconds), kill]
        case _:
            return [ScheduledFault(at_s - 0.1, FaultKind.STARVE, for_s=duration(dice)), kill]


def _wall_jump(dice: Dice, at_s: float, target: str) -> ScheduledFault:
    """Up to an hour forward or back."""
    seconds = dice.choice((-1.0, 1.0)) * 60 * duration(dice)
    return ScheduledFault(at_s, FaultKind.WALL, target, value=seconds)


def _blackout(dice: Dice, shape: FaultyClusterShape, at_s: float) -> list[ScheduledFault]:
    """The manager and all instances die at once, and their clocks are others when they come back."""
    kills = ["manager"] + sum(shape.instances.values()) * ["instance:0"]
    return [
        _wall_jump(dice, at_s - 0.1, ""),
        *(ScheduledFault(at_s, FaultKind.KILL, target) for target in kills),
    ]


def network(dice: Dice, shape: FaultyClusterShape, requests: int) -> list[ScheduledFault]:
    """Messages that are lost, late or doubled."""
    at_s = dice.uniform(*FAULTS_S)
    process, peer = a_process(dice, shape, requests), a_process(dice, shape, requests)
    match dice.randrange(5):
        case 0:
            both = float(dice.choice((1, 2)))
            return [
                ScheduledFault(at_s, FaultKind.CUT, process, dice.choice((peer, "")), duration(dice), both)
            ]
        case 1:
            both = float(dice.choice((1, 2)))
            return [
                ScheduledFault(at_s, FaultKind.RESET, process, dice.choice((peer, "")), duration(dice), both)
            ]
        case 2:
            return [
                ScheduledFault(
                    at_s, FaultKind.DELAY, process, for_s=duration(dice), value=dice.uniform(0.01, 2.0)
                )
            ]
        case 3:
            return [
                ScheduledFault(
                    at_s, FaultKind.LOSE, process, for_s=duration(dice), value=dice.uniform(0.001, 0.2)
                )
            ]
        case _:
            return [
                ScheduledFault(
                    at_s, FaultKind.DUPLICATE, process, for_s=duration(dice), value=dice.uniform(0.01, 0.5)
                )
            ]


def operation(dice: Dice, shape: FaultyClusterShape, requests: int) -> list[ScheduledFault]:
    """An operation by hand; perhaps the manager dies in the middle of it."""
    at_s = dice.uniform(*FAULTS_S)
    instance = f"instance:{dice.randrange(8)}"
    role = dice.choice(list(shape.instances))
    found = [
        [
            ScheduledFault(at_s, FaultKind.DRAIN, instance),
            ScheduledFault(at_s + duration(dice), FaultKind.UNDO),
        ],
        [ScheduledFault(at_s, FaultKind.DRAIN_STOP, instance)],
        [
            ScheduledFault(at_s, FaultKind.DRAIN_STOP, instance),
            ScheduledFault(at_s + duration(dice), FaultKind.UNDO),
        ],
        [ScheduledFault(at_s, FaultKind.SCALE, role, value=1.0)],
        [
            ScheduledFault(at_s, FaultKind.SCALE, role, value=1.0),
            ScheduledFault(at_s + duration(dice), FaultKind.SCALE, role, value=-1.0),
        ],
        [ScheduledFault(at_s, FaultKind.RESTART)],
        [
            ScheduledFault(
                at_s, FaultKind.ROLE, instance, dice.choice(("prefill", "decode")), for_s=duration(dice)
            )
        ],
        [ScheduledFault(at_s, FaultKind.MIGRATE, instance, value=float(dice.randrange(requests)))],
    ]
    faults = dice.choice(found)
    if not shape.one_process and dice.random() < 0.3:
        kind = FaultKind.KILL if dice.random() < 0.7 else FaultKind.TWIN
        faults.append(ScheduledFault(at_s + dice.uniform(0.0, 3.0), kind, "manager"))
    return faults
