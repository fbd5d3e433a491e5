"""The next turn of a conversation is handed off to where the blocks of the last one are."""

import asyncio
import random
from dataclasses import replace

from migration.messages import RequestId
from migration.record import MigrationRecord
from pd_serve.simulated_engine.contents import TokenPrompt, expected_output
from pd_serve.simulated_engine.cost_model import LinearCostModel
from pd_serve.simulated_engine.settings import EngineSettings
from tests.integration.socket_cluster import SETTINGS, Cluster

CACHING = replace(SETTINGS, prefix_caching=True)
CONVERSATIONS, TURNS, PROMPT, ANSWER, MORE = 3, 2, 600, 50, 40


async def converse(
    answer: int = ANSWER, settings: EngineSettings = CACHING, **changes: object
) -> tuple[Cluster, list[list[MigrationRecord]]]:
    dice = random.Random(1)
    cluster = Cluster(settings, **changes)
    await cluster.start()
    texts = [[dice.randrange(1000) for _ in range(PROMPT)] for _ in range(CONVERSATIONS)]
    for turn in range(TURNS):
        cluster.all_ended.clear()
        for conversation, text in enumerate(texts):
            cluster.submit(f"{conversation}.{turn}", list(text), answer)
        async with asyncio.timeout(60):
            await cluster.all_ended.wait()
        for conversation, text in enumerate(texts):
            output = cluster.tokens[f"{conversation}.{turn}"]
            assert output == expected_output(TokenPrompt(text), answer, cluster.settings.block_tokens)
            text += output + [dice.randrange(1000) for _ in range(MORE)]
        await asyncio.sleep(1.0)  # instances report what they have
    await cluster.stop()
    handoffs = {record.request_id: record for record in cluster.observer.migrations}
    names = [[RequestId(f"{c}.{turn}") for turn in range(TURNS)] for c in range(CONVERSATIONS)]
    return cluster, [[handoffs[name] for name in turns] for turns in names]


async def test_a_second_turn_goes_where_the_first_one_was_and_copies_what_is_new() -> None:
    cluster, handoffs = await converse(handoff="prefix")

    block_tokens = cluster.settings.block_tokens
    for first, *later in handoffs:
        assert first.committed
        assert first.blocks >= PROMPT // block_tokens
        for handoff in later:
            assert handoff.committed
            assert handoff.destination == first.destination
            assert handoff.blocks <= (ANSWER + MORE) // block_tokens + 3
    assert {first.destination for first, *_ in handoffs} == {"decode-0", "decode-1"}
    index = cluster.frontend.instances.loads.prefixes
    assert min(len(index.keys(name)) for name in ("decode-0", "decode-1")) > PROMPT // block_tokens


async def test_an_answer_comes_back_to_where_the_next_turn_is_computed() -> None:
    """Its blocks are copied from the decode instance, and only the new text is computed."""
    answer = 200
    # In milliseconds: computing takes longer than copying on any machine.
    model = LinearCostModel((5.0, 4.0, 0.0), (5.0, 0.1, 0.0))
    settings = replace(SETTINGS, cost_model=model, prefix_caching=True)
    cluster, handoffs = await converse(answer, settings, prefill_dispatch="soonest", handoff="prefix")

    assert all(handoff.committed for turns in handoffs for handoff in turns)
    coordinators = [cluster.llumlets[name].coordinator for name in ("prefill-0", "prefill-1")]
    readers = [coordinator.prefixes.reader for coordinator in coordinators if coordinator is not None]
    assert sum(reader.outcomes["copied"] for reader in readers) == CONVERSATIONS
    copied = sum(reader.tokens_copied for reader in readers) // settings.block_tokens
    computed_elsewhere = [(PROMPT + answer) // settings.block_tokens - first.blocks for first, _ in handoffs]
    assert copied >= sum(computed_elsewhere) - CONVERSATIONS  # more, if another prefill instance was sooner
    assert sum(computed_elsewhere) * settings.block_tokens > CONVERSATIONS * answer / 2
