"""What a simulated engine's prefix cache gains and loses."""

import asyncio
import random

from migration.cached_keys import KeyChanges
from pd_serve.simulated_engine.block_pool import BlockPool
from pd_serve.simulated_engine.cached_keys import SimulatedKeys, key_format, key_of, prompt_keys
from pd_serve.simulated_engine.contents import SegmentPrompt, TokenPrompt
from pd_serve.simulated_engine.cost_model import COST_MODELS
from pd_serve.simulated_engine.settings import EngineSettings


def test_a_prefix_has_the_same_keys_in_every_prompt() -> None:
    one, other = (list(prompt_keys(TokenPrompt([*range(40), *end]), 16)) for end in ([1] * 30, [2] * 30))

    assert len(one) == 4
    assert (one[:2], one[2:] == other[2:]) == (other[:2], False)
    assert all(0 <= key < 2**64 for key in one)


def test_of_a_prompt_with_names_the_keys_of_the_shared_part_are_those_of_the_engine() -> None:
    mine, yours = (list(prompt_keys(SegmentPrompt(1200, (7, 8), 512, seed), 16, 1024)) for seed in (1, 2))

    assert mine == yours
    assert len(mine) == 64


def test_an_engine_without_a_prefix_cache_has_no_keys() -> None:
    settings = EngineSettings(COST_MODELS["a10-llama-7b"])
    assert key_format(settings) is None


def test_whoever_takes_the_changes_knows_what_the_cache_has() -> None:
    dice = random.Random(0)
    pool, known = BlockPool(20), set[int]()
    keys, held = SimulatedKeys(pool), list[int]()

    async def look() -> None:
        while (changes := await keys.take(4)) is not None:
            if changes.anew:
                known.clear()
            known.update(changes.gained)
            known.difference_update(changes.lost)

    async def run() -> None:
        for number in range(200):
            pool.release(held)
            held.clear()
            if dice.random() < 0.1:
                assert pool.empty_cache()
                assert pool.num_free == 20
            held.extend(pool.allocate(dice.randrange(6)))
            for block in held:
                pool.publish(block, hash((number, block % 3)))
            if dice.random() < 0.5:
                await look()
                assert known == set(map(key_of, pool.hashes))
        assert pool.check_integrity(held) == []

    asyncio.run(run())


def test_nothing_is_recorded_before_the_first_look() -> None:
    pool = BlockPool(4)
    [block] = pool.allocate(1)
    pool.publish(block, -1)
    assert pool.record is None

    assert asyncio.run(SimulatedKeys(pool).take(10)) == KeyChanges([2**64 - 1], [], True)
