"""Clients in an open and in a closed loop, against a server that may fail."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import pytest
from aiohttp import web

from loadtests.bench.clients import run_round
from loadtests.bench.load import Lengths, Load
from loadtests.bench.rounds import Round
from loadtests.servers import free_port

LOAD = Load("closed", 7, Lengths.equal(4, 5), num_clients=3)


@dataclass
class FakeCompletions:
    """Streams like vLLM; counts concurrent requests."""

    token_delay_s: float = 0.001
    tokens_short: int = 0
    status: int = 200
    concurrent: int = 0
    max_concurrent: int = 0
    prompts: list[list[int] | str] = field(default_factory=list)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        if self.status != 200:
            return web.Response(status=self.status, reason="not now")
        body = await request.json()
        assert body["stream"]
        assert body["ignore_eos"]
        self.prompts.append(body["prompt"])
        self.concurrent += 1
        self.max_concurrent = max(self.max_concurrent, self.concurrent)
        response = web.StreamResponse()
        await response.prepare(request)
        num_tokens = body["max_tokens"] - self.tokens_short
        chunks = [{"choices": [{"text": "a"}]}] * num_tokens
        for chunk in [
            *chunks,
            {"choices": [], "usage": {"completion_tokens": num_tokens, "prompt_tokens": 4}},
        ]:
            await asyncio.sleep(self.token_delay_s)
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        self.concurrent -= 1
        return response


@pytest.fixture
async def fake() -> FakeCompletions:
    return FakeCompletions()


@pytest.fixture
async def url(fake: FakeCompletions) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/completions", fake.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def measured(url: str, load: Load = LOAD, seed: int = 1) -> Round:
    return await run_round(url, lambda: 1.0, load, seed)


async def test_each_client_of_a_closed_loop_waits_for_its_previous_request(
    fake: FakeCompletions, url: str
) -> None:
    one = await measured(url)

    assert len(fake.prompts) == len(one.outcomes) == 7
    assert fake.max_concurrent == 3
    assert {outcome.tokens for outcome in one.outcomes} == {5}
    assert all(outcome.error is None and outcome.ttft_s and outcome.gaps_s for outcome in one.outcomes)
    assert (one.cpu_s, one.num_tokens) == (0.0, 35)


async def test_an_open_loop_does_not_wait_for_earlier_requests(fake: FakeCompletions, url: str) -> None:
    fake.token_delay_s = 0.1

    one = await measured(url, replace(LOAD, rate=1000.0, num_clients=0))

    assert fake.max_concurrent == 7
    assert sorted(outcome.number for outcome in one.outcomes) == list(range(7))


async def test_the_same_seed_sends_the_same_prompts_and_another_one_does_not(
    fake: FakeCompletions, url: str
) -> None:
    for seed in (1, 1, 2):
        await measured(url, seed=seed)

    assert sorted(fake.prompts[:7]) == sorted(fake.prompts[7:14])
    assert sorted(fake.prompts[:7]) != sorted(fake.prompts[14:])


async def test_a_turn_s_prompt_is_the_last_one_its_answer_and_new_text(
    fake: FakeCompletions, url: str
) -> None:
    load = Load("turns", 6, Lengths.equal(4, 5), num_clients=1, as_text=True, turns=3)

    one = await measured(url, load)

    assert len(fake.prompts) == 6
    for number in (1, 2, 4, 5):
        before, prompt = str(fake.prompts[number - 1]), str(fake.prompts[number])
        assert prompt.startswith(f"{before}aaaaa")
        assert len(prompt) == len(before) + 5 + 4
    assert [outcome.is_later_turn for outcome in one.outcomes] == [False, True, True] * 2
    assert [outcome.prompt_tokens for outcome in one.outcomes] == [4, 13, 22] * 2


async def test_a_failed_turn_is_the_last_of_its_session(fake: FakeCompletions, url: str) -> None:
    fake.status = 503

    one = await measured(url, Load("turns", 6, Lengths.equal(4, 5), num_clients=1, as_text=True, turns=3))

    assert [outcome.number for outcome in one.outcomes] == [0, 3]


async def test_a_refused_request_is_a_failure(fake: FakeCompletions, url: str) -> None:
    fake.status = 503

    one = await measured(url)

    assert ["not now" in (outcome.error or "") for outcome in one.outcomes] == [True] * 7


async def test_a_request_with_too_few_tokens_is_a_failure(fake: FakeCompletions, url: str) -> None:
    fake.tokens_short = 1

    one = await measured(url)

    assert {outcome.error for outcome in one.outcomes} == {"4 tokens received instead of 5"}


async def test_a_missing_server_is_a_failure_of_each_request() -> None:
    one = await measured(f"http://127.0.0.1:{free_port()}")

    assert len(one.outcomes) == 7
    assert all(outcome.error for outcome in one.outcomes)
