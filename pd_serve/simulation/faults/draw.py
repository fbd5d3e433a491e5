"""Draws the schedule of a run from its seed."""

import random

from msgspec.structs import replace

from pd_serve.simulation.faults.draw_faults import Dice, network, operation, orphaned, single
from pd_serve.simulation.faults.draw_rare import rare, rare_shape
from pd_serve.simulation.faults.schedule import ClientRequest, FaultyClusterShape, Schedule, ScheduledFault

#: Policies that need to know what is in the instances' prefix caches.
PREFIX_POLICIES: dict[str, str | float] = {
    "dispatch": "prefix",
    "prefill_dispatch": "prefix",
    "handoff": "prefix",
    "handoff.min_tokens": 16,
}


def draw(seed: int, tier: int) -> Schedule:
    """The schedule of a seed: cluster, requests and faults are drawn independently."""
    shape = _shape(random.Random(f"{tier}/{seed}/shape"), tier)
    if shape.prefix_caching:
        shape = _with_prefixes(random.Random(f"{tier}/{seed}/policies"), shape)
    orphans = random.Random(f"{tier}/{seed}/orphans")
    if shape.api_servers > 1 and orphans.random() < 0.5:
        shape = replace(shape, orphan_s=orphans.choice((3.0, 10.0, 30.0)), comes_back=True)
    if tier == 4:
        shape = rare_shape(random.Random(f"{tier}/{seed}/rare shape"), shape)
    requests = _requests(random.Random(f"{tier}/{seed}/requests"), tier, shape)
    requests = _slow_readers(random.Random(f"{tier}/{seed}/readers"), requests)
    faults = _faults(random.Random(f"{tier}/{seed}/faults"), tier, shape, len(requests))
    if shape.comes_back and tier > 1:
        faults += orphaned(orphans, len(requests))
    if tier == 4:
        dice = random.Random(f"{tier}/{seed}/rare")
        for _ in range(dice.randrange(1, 4)):
            faults += rare(dice, shape, len(requests))
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


def _faults(dice: Dice, tier: int, shape: FaultyClusterShape, requests: int) -> list[ScheduledFault]:
    if tier == 1:
        return single(dice, shape, requests)
    count = {2: (2, 5), 3: (4, 10), 4: (1, 4)}[tier]
    drawn: list[ScheduledFault] = []
    for _ in range(dice.randrange(*count)):
        kinds = single if dice.random() < 0.5 else network if dice.random() < 0.5 else operation
        drawn += kinds(dice, shape, requests)
    return drawn
