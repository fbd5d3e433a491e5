"""Draws the schedule of a run from its seed."""

import random
from collections.abc import Callable

from msgspec.structs import replace

from pd_serve.simulation.faults.schedule import (
    ClientRequest,
    FaultKind,
    FaultyClusterShape,
    Schedule,
    ScheduledFault,
)

#: Faults begin within this time after the cluster is ready.
FAULTS_S = (1.0, 14.0)

#: Messages of a migration, at which faults happen precisely.
STAGES = ("AddRequest", "Offer", "Pull", "Stage", "Final", "Committed", "Tokens", "MigrationEnded")

#: Messages of a prefix copy.
PREFIX_STAGES = ("PrefixAsk", "PrefixOffer", "PrefixRead", "PrefixConfirmed")

#: Policies that need to know what is in the instances' prefix caches.
PREFIX_POLICIES: dict[str, str | int] = {
    "dispatch": "prefix",
    "prefill_dispatch": "prefix",
    "handoff": "prefix",
    "handoff.min_tokens": 16,
}

Dice = random.Random
DrawFaults = Callable[[Dice, FaultyClusterShape, int], list[ScheduledFault]]


def draw(seed: int, tier: int) -> Schedule:
    """The schedule of a seed: cluster, requests and faults are drawn independently."""
    shape = _shape(random.Random(f"{tier}/{seed}/shape"), tier)
    if shape.prefix_caching:
        shape = _with_prefixes(random.Random(f"{tier}/{seed}/policies"), shape)
    orphans = random.Random(f"{tier}/{seed}/orphans")
    if shape.api_servers > 1 and orphans.random() < 0.5:
        shape = replace(shape, orphan_s=orphans.choice((3.0, 10.0, 30.0)))
    requests = _requests(random.Random(f"{tier}/{seed}/requests"), tier, shape)
    requests = _slow_readers(random.Random(f"{tier}/{seed}/readers"), requests)
    faults = _faults(random.Random(f"{tier}/{seed}/faults"), tier, shape, len(requests))
    if shape.orphan_s and tier > 1:
        faults += _orphaned(orphans, len(requests))
    return Schedule(seed, tier, shape, requests, sorted(faults, key=lambda fault: fault.at_s))


def _shape(dice: Dice, tier: int) -> FaultyClusterShape:
    pools: list[dict[str, int]] = [
        {"prefill": 1, "decode": 2},
        {"prefill": 1, "decode": 1},
        {"neutral": 2},
        {"prefill": 2, "decode": 2},
        {"neutral": 3},
    ]
    if tier > 1:
        pools += [{"prefill": 2, "decode": 3}, {"prefill": 1, "decode": 1, "neutral": 1}]
    one_process = dice.random() < 0.2
    instances = dice.choice(pools)
    autoscale: dict[str, tuple[int, int]] = {}
    if tier > 2 and dice.random() < 0.3:
        autoscale = {role: (1, count + 2) for role, count in instances.items()}
    return FaultyClusterShape(
        instances=instances,
        api_servers=1 if one_process else dice.choice((1, 2, 2, 3)),
        one_process=one_process,
        num_blocks=dice.choice((60, 96, 160)),
        chunk_tokens=dice.choice((None, 64, 128)),
        prefix_caching=dice.random() < 0.4,
        async_scheduling=dice.random() < 0.5,
        autoscale=autoscale,
        start_instance_s=dice.choice((1.0, 3.0, 8.0)),
        resume_order=dice.choice(("as it came", "timers first", "messages first")),
        sampled=dice.random() < 0.5,
    )


def _with_prefixes(dice: Dice, shape: FaultyClusterShape) -> FaultyClusterShape:
    """Mostly policies that follow the prefix caches, half of which copy prefixes, too."""
    chance = dice.random()
    if chance < 0.35:
        return replace(shape, policy="conditional", settings={"decode_prompt_tokens": 32})
    return replace(shape, settings=PREFIX_POLICIES) if chance < 0.7 else shape


def _requests(dice: Dice, tier: int, shape: FaultyClusterShape) -> list[ClientRequest]:
    requests = []
    shares = 0.9 if shape.policy == "conditional" else 0.5 if shape.prefix_caching else 0.0
    for _ in range(dice.randrange(6, 15) if tier == 1 else dice.randrange(10, 25)):
        prompt = min(600, 1 + int(dice.expovariate(1 / (400 if shape.policy == "conditional" else 120))))
        output = min(200, 1 + int(dice.expovariate(1 / 60)))
        aborts_after = dice.randrange(0, output) if dice.random() < 0.15 else None
        requests.append(
            ClientRequest(
                arrival_s=dice.uniform(0.0, 12.0),
                prompt_tokens=prompt,
                output_tokens=output,
                priority=-1 if dice.random() < 0.1 else 0,
                segments=(dice.randrange(3),) if shares and dice.random() < shares else (),
                aborts_after=aborts_after,
            )
        )
    return sorted(requests, key=lambda request: request.arrival_s)


def _slow_readers(dice: Dice, requests: list[ClientRequest]) -> list[ClientRequest]:
    """Some clients read once in 0.05 to 20 s."""
    return [
        replace(request, reads_every_s=0.05 * 400 ** dice.random()) if dice.random() < 0.1 else request
        for request in requests
    ]


# ---- faults


def _faults(dice: Dice, tier: int, shape: FaultyClusterShape, requests: int) -> list[ScheduledFault]:
    if tier == 1:
        return _single(dice, shape, requests)
    count = dice.randrange(2, 5) if tier == 2 else dice.randrange(4, 10)
    drawn: list[ScheduledFault] = []
    for _ in range(count):
        kinds = _single if dice.random() < 0.5 else _network if dice.random() < 0.5 else _operation
        drawn += kinds(dice, shape, requests)
    return drawn


def _orphaned(dice: Dice, requests: int) -> list[ScheduledFault]:
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


def _duration(dice: Dice) -> float:
    """From 0.1 to 60 s, as often below as above 2.4 s."""
    return float(0.1 * 600 ** dice.random())


def _process(dice: Dice, shape: FaultyClusterShape, requests: int, *, killed: bool = False) -> str:
    found = [f"instance:{dice.randrange(8)}", f"owner:{dice.randrange(requests)}", "scheduler"]
    found += [f"{dice.choice(list(shape.instances))}:{dice.randrange(4)}"]
    if not (killed and shape.one_process):
        found += ["manager", f"api:{dice.randrange(3)}"]
    return dice.choice(found)


def _single(dice: Dice, shape: FaultyClusterShape, requests: int) -> list[ScheduledFault]:
    """One fault of a process, its memory, its clock or its clients, perhaps in the middle of a migration."""
    at_s = dice.uniform(*FAULTS_S)
    on, process = "", _process(dice, shape, requests)
    if dice.random() < 0.4:
        on = dice.choice(PREFIX_STAGES if shape.policy == "conditional" and dice.random() < 0.5 else STAGES)
    instance = dice.choice((f"instance:{dice.randrange(8)}", f"owner:{dice.randrange(requests)}"))
    match dice.randrange(20):
        case 0 | 1 | 2 | 3:
            target = _process(dice, shape, requests, killed=True)
            if on and dice.random() < 0.7 and not shape.one_process:
                target = dice.choice(("sender", "receiver"))
            return [ScheduledFault(at_s, FaultKind.KILL, target, on=on)]
        case 4 | 5 | 6 | 7:
            target = dice.choice(("sender", "receiver")) if on and dice.random() < 0.5 else process
            freeze = ScheduledFault(at_s, FaultKind.FREEZE, target, for_s=_duration(dice), on=on)
            if dice.random() < 0.2:
                return [ScheduledFault(at_s, FaultKind.HANG, dice.choice((instance, "scheduler")), on=on)]
            return [freeze]
        case 8:
            jump = ScheduledFault(at_s, FaultKind.CLOCK, process, value=_duration(dice))
            return [_wall_jump(dice, at_s, dice.choice((process, ""))) if dice.random() < 0.3 else jump]
        case 9:
            return [ScheduledFault(at_s, FaultKind.STALL_READS, instance, for_s=_duration(dice), on=on)]
        case 10:
            return [ScheduledFault(at_s, FaultKind.FAIL_READS, instance, for_s=_duration(dice), on=on)]
        case 11:
            return [ScheduledFault(at_s, FaultKind.FLIP, instance)]
        case 12:
            call = dice.choice(("reserve", "grow", "commit"))
            return [ScheduledFault(at_s, FaultKind.REFUSE, instance, call)]
        case 13:
            call = dice.choice(("add", "abort", "describe", "resume", "release", "reserve", "commit", "drop"))
            seconds = min(10.0, _duration(dice))
            return [ScheduledFault(at_s, FaultKind.SLOW_CALL, instance, call, for_s=5.0, value=seconds)]
        case 14:
            return [ScheduledFault(at_s, FaultKind.PREEMPT, instance, on=on)]
        case 15:
            aborted = float(dice.randrange(requests))
            return [ScheduledFault(at_s, FaultKind.ABORT, value=aborted, on=on)]
        case 16:
            peer = _process(dice, shape, requests)
            both = float(dice.choice((1, 2)))
            return [ScheduledFault(at_s, FaultKind.CUT, process, peer, _duration(dice), both, on)]
        case 17:
            return [
                ScheduledFault(
                    at_s, FaultKind.DELAY, process, for_s=_duration(dice), value=dice.uniform(0.01, 1.0)
                )
            ]
        case 18 if dice.random() < 0.5:
            return [ScheduledFault(at_s, FaultKind.STEP, instance, for_s=_duration(dice))]
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
            return [ScheduledFault(at_s - 0.1, FaultKind.STARVE, for_s=_duration(dice)), kill]


def _wall_jump(dice: Dice, at_s: float, target: str) -> ScheduledFault:
    """Up to an hour forward or back."""
    seconds = dice.choice((-1.0, 1.0)) * 60 * _duration(dice)
    return ScheduledFault(at_s, FaultKind.WALL, target, value=seconds)


def _blackout(dice: Dice, shape: FaultyClusterShape, at_s: float) -> list[ScheduledFault]:
    """The manager and all instances die at once, and their clocks are others when they come back."""
    kills = ["manager"] + sum(shape.instances.values()) * ["instance:0"]
    return [
        _wall_jump(dice, at_s - 0.1, ""),
        *(ScheduledFault(at_s, FaultKind.KILL, target) for target in kills),
    ]


def _network(dice: Dice, shape: FaultyClusterShape, requests: int) -> list[ScheduledFault]:
    """Messages that are lost, late or doubled."""
    at_s = dice.uniform(*FAULTS_S)
    process, peer = _process(dice, shape, requests), _process(dice, shape, requests)
    match dice.randrange(5):
        case 0:
            both = float(dice.choice((1, 2)))
            return [
                ScheduledFault(at_s, FaultKind.CUT, process, dice.choice((peer, "")), _duration(dice), both)
            ]
        case 1:
            both = float(dice.choice((1, 2)))
            return [
                ScheduledFault(at_s, FaultKind.RESET, process, dice.choice((peer, "")), _duration(dice), both)
            ]
        case 2:
            return [
                ScheduledFault(
                    at_s, FaultKind.DELAY, process, for_s=_duration(dice), value=dice.uniform(0.01, 2.0)
                )
            ]
        case 3:
            return [
                ScheduledFault(
                    at_s, FaultKind.LOSE, process, for_s=_duration(dice), value=dice.uniform(0.001, 0.2)
                )
            ]
        case _:
            return [
                ScheduledFault(
                    at_s, FaultKind.DUPLICATE, process, for_s=_duration(dice), value=dice.uniform(0.01, 0.5)
                )
            ]


def _operation(dice: Dice, shape: FaultyClusterShape, requests: int) -> list[ScheduledFault]:
    """An operation by hand; perhaps the manager dies in the middle of it."""
    at_s = dice.uniform(*FAULTS_S)
    instance = f"instance:{dice.randrange(8)}"
    role = dice.choice(list(shape.instances))
    found = [
        [
            ScheduledFault(at_s, FaultKind.DRAIN, instance),
            ScheduledFault(at_s + _duration(dice), FaultKind.UNDO),
        ],
        [ScheduledFault(at_s, FaultKind.DRAIN_STOP, instance)],
        [
            ScheduledFault(at_s, FaultKind.DRAIN_STOP, instance),
            ScheduledFault(at_s + _duration(dice), FaultKind.UNDO),
        ],
        [ScheduledFault(at_s, FaultKind.SCALE, role, value=1.0)],
        [
            ScheduledFault(at_s, FaultKind.SCALE, role, value=1.0),
            ScheduledFault(at_s + _duration(dice), FaultKind.SCALE, role, value=-1.0),
        ],
        [ScheduledFault(at_s, FaultKind.RESTART)],
        [
            ScheduledFault(
                at_s, FaultKind.ROLE, instance, dice.choice(("prefill", "decode")), for_s=_duration(dice)
            )
        ],
        [ScheduledFault(at_s, FaultKind.MIGRATE, instance, value=float(dice.randrange(requests)))],
    ]
    faults = dice.choice(found)
    if not shape.one_process and dice.random() < 0.3:
        kind = FaultKind.KILL if dice.random() < 0.7 else FaultKind.TWIN
        faults.append(ScheduledFault(at_s + dice.uniform(0.0, 3.0), kind, "manager"))
    return faults
