"""`--engine simulated`: everything but the model is real, and its words show what becomes of the KV cache."""

import asyncio
import json
import re

import pytest

from tests.e2e.completion_client import Body, CompletionClient
from tests.e2e.prompts import token_ids
from tests.e2e.server_process import ServerProcess
from tests.e2e.streams import streaming
from tests.e2e.test_same_output import assert_same

MESSAGES = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def server(simulated: ServerProcess) -> ServerProcess:
    return simulated


async def test_completions_of_a_prompt_are_equal_and_handed_off_once(client: CompletionClient) -> None:
    """Streamed and not, the same prompt has the same answer, and each is handed off once."""
    body: Body = {"prompt": token_ids(100), "max_tokens": 40}
    first = await client.answer(body)
    again = await client.answer(body)
    streamed = await client.stream(body)
    other = await client.answer(body | {"prompt": token_ids(100, 1)})
    assert_same(again, first)
    assert_same(streamed, first)
    assert other.only.text != first.only.text
    assert (len(first.only.token_ids), first.only.finish_reason) == (40, "length")
    assert first.only.text.isalpha()
    for answer in (first, streamed):
        usage = {name: answer.usage[f"{name}_tokens"] for name in ("prompt", "completion", "total")}
        assert usage == {"prompt": 100, "completion": 40, "total": 140}
    for answer in (first, again, streamed, other):
        assert len(await client.handed_off(answer.request_id)) == 1


async def test_streamed_chat_adds_up_to_the_text_of_its_tokens(client: CompletionClient) -> None:
    body: Body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20}
    whole = (await client.http.post("/v1/chat/completions", json=body)).json()
    text = whole["choices"][0]["message"]["content"]
    assert whole["usage"]["completion_tokens"] == len(text) == 20

    request = body | {"stream": True}
    async with client.http.stream("POST", "/v1/chat/completions", json=request) as response:
        events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert events.pop() == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == text


async def test_a_migrated_request_has_the_unmoved_ones_answer(client: CompletionClient) -> None:
    """Each token depends on the contents of all KV blocks: one that is lost or stale would show."""
    body: Body = {"prompt": token_ids(500, 2), "max_tokens": 150}
    expected = await client.answer(body)
    answer = await client.stream(body, client.tour(["decode-0", "decode-1", "decode-0"]))
    assert_same(answer, expected)
    assert {move.status for move in answer.moves} == {200}
    assert len(answer.moves) >= 2
    assert all(move.body["tokens"] > 500 for move in answer.moves)


async def test_a_request_moved_to_the_prefill_instance_is_handed_off_again(client: CompletionClient) -> None:
    body = {"prompt": token_ids(100), "max_tokens": 2000, "ignore_eos": True}
    async with client.open(body, "returns") as events:
        await anext(events)
        await client.handed_off("returns")
        assert (await client.migrate("returns", "prefill-0")).done
        await client.handed_off("returns", 2)


async def test_vllms_gauges_are_zero_when_all_requests_have_left(client: CompletionClient) -> None:
    """Two are aborted, on the prefill and on a decode instance, and one moves before it finishes."""
    gauges = re.compile(r"^vllm:(?:num_requests_\w+|kv_cache_usage_perc)\{.* (\S+)$", re.MULTILINE)

    async def values() -> list[float]:
        return [float(value) for value in gauges.findall((await client.http.get("/metrics")).text)]

    long: list[Body] = [{"prompt": token_ids(300, i), "max_tokens": 4000} for i in range(2)]
    async with streaming(client, long, 20) as streams:
        await client.until(lambda cluster: sum(i["running"] for i in cluster["instances"][1:]) == 2)
        assert max(await values()) > 0
        for stream in streams:
            stream.answer.cancel()
        await asyncio.wait([stream.answer for stream in streams])
    body: Body = {"prompt": token_ids(300, 2), "max_tokens": 100}
    await client.stream(body, client.tour(["decode-0", "decode-1"]))
    await client.until(lambda cluster: not any(i["running"] for i in cluster["instances"]))
    shown = await values()
    assert len(shown) == 3 * 5
    assert set(shown) == {0}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("completions", {"prompt": "x", "logprobs": 2}, "no logprobs"),
        ("chat/completions", {"messages": MESSAGES, "logprobs": True}, "no logprobs"),
        (
            "chat/completions",
            {"messages": MESSAGES, "response_format": {"type": "json_object"}},
            "follows no grammar",
        ),
    ],
)
async def test_parameters_that_need_a_model_are_refused(
    client: CompletionClient, path: str, body: Body, says: str, stream: bool
) -> None:
    request = {"model": "tiny", "max_tokens": 5, "stream": stream, **body}
    response = await client.http.post(f"/v1/{path}", json=request)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == 400
    assert says in response.json()["error"]["message"]
