"""Streams over real sockets whose connections stall and are reset, so that ZeroMQ loses messages."""

import asyncio
import random

import pytest

from pd_serve.simulated_engine.contents import TokenPrompt, expected_output
from tests.integration.socket_cluster import SETTINGS, Cluster


@pytest.mark.parametrize("seed", range(2))
async def test_streams_are_exact_and_end_while_connections_stall_and_are_reset(seed: int) -> None:
    dice = random.Random(seed)
    cluster = Cluster()
    await cluster.start()
    disturbing = asyncio.create_task(cluster.disturb(dice))
    prompts = {str(n): [dice.randrange(1000) for _ in range(dice.randrange(20, 200))] for n in range(16)}
    lengths = {request_id: dice.randrange(60, 200) for request_id in prompts}
    for request_id, prompt in prompts.items():
        cluster.submit(request_id, prompt, lengths[request_id])
        await asyncio.sleep(dice.random() / 10)

    async with asyncio.timeout(120):
        await cluster.all_ended.wait()
    disturbing.cancel()

    assert set(cluster.ends.values()) == {"length"}
    for request_id, prompt in prompts.items():
        expected = expected_output(TokenPrompt(prompt), lengths[request_id], SETTINGS.block_tokens)
        assert cluster.tokens[request_id] == expected
    assert sum(proxy.num_resets for proxy in cluster.proxies) > 20
    assert cluster.observer.kinds, "no message was lost"
    await cluster.stop()
