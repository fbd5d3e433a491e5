"""The real application on a real socket, over an engine core that plays a script."""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import openai
import pytest
import pytest_asyncio
from fastapi import FastAPI

# Before vLLM is imported: nothing to look up on a network, no plugins, no start-up messages.
os.environ.setdefault("VLLM_PLUGINS", "")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pd_serve.api.app import TRACEBACK_LOGGERS, create_app
from pd_serve.api.engine_client import ClusterAsyncLLM
from pd_serve.api.keys import KeyAccounts
from pd_serve.api.overload import GENERATING_PATHS
from pd_serve.api.server import bind, serve
from pd_serve.errors import EngineDeadError, InvalidRequestError, OverloadedError
from pd_serve.frontend.accounts import Accounts
from pd_serve.launch import engine_flags
from pd_serve.models import resolve
from router.rate_limits import KeyLimits
from tests.connections import LIMITS
from tests.integration.scripted_core import ScriptedCluster, ScriptedCore

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@dataclass
class LocalService:
    """A running server and the fakes behind it."""

    http: httpx.AsyncClient
    core: ScriptedCore
    cluster: ScriptedCluster
    engine_client: ClusterAsyncLLM
    app: FastAPI
    serving: "asyncio.Task[None]"

    async def complete(self, **body: object) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": "tiny", "prompt": "x", **body})

    def start(self, **body: object) -> "asyncio.Task[httpx.Response]":
        return asyncio.create_task(self.complete(**body))

    async def taken(self, count: int = 1) -> None:
        await eventually(lambda: len(self.core.added) >= count)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for is vLLM's state
            await asyncio.sleep(0.005)


@pytest.fixture(scope="module")
def vllm_config():
    flags = {"model": resolve("tiny"), "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
    return engine_flags.parse([], flags).engine_args("neutral").create_engine_config()


@asynccontextmanager
async def running(
    vllm_config,
    *flags: str,
    max_waiting: int | None = 4,
    admin_key: str | None = None,
    max_body_bytes: int = 32 * 2**20,
    max_connections: int = 10_000,
    accounts: Accounts | None = None,
    account: Callable[[], int] = lambda: 0,
) -> AsyncIterator[LocalService]:
    args = engine_flags.parse(list(flags), {"model": resolve("tiny"), "served_model_name": ["tiny"]}).server
    core, cluster = ScriptedCore(), ScriptedCluster()
    client = ClusterAsyncLLM(
        vllm_config, core, log_requests=False, log_stats=True, accounts=accounts, account=account
    )
    app = await create_app(
        args,
        client,
        cluster,
        max_waiting=max_waiting,
        admin_key=admin_key,
        max_body_bytes=max_body_bytes,
    )
    sock = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    ready = asyncio.Event()
    serving = asyncio.create_task(
        serve(
            app,
            sock,
            args,
            on_ready=ready.set,
            max_connections=max_connections,
            connections_elsewhere=lambda: cluster.num_connections_elsewhere,
        )
    )
    await asyncio.wait_for(ready.wait(), 5)
    try:
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=LIMITS) as http:
            yield LocalService(http, core, cluster, client, app, serving)
    finally:
        serving.cancel()
        await asyncio.wait({serving})
        client.shutdown()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(vllm_config) -> AsyncIterator[LocalService]:
    async with running(vllm_config) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module")
async def service(shared: LocalService) -> AsyncIterator[LocalService]:
    """The shared server, which must be left without requests."""
    shared.core.added.clear()
    shared.core.aborted.clear()
    yield shared
    shared.core.refusal = shared.core.fails_after = None
    shared.core.entrance.set()
    shared.core.running.set()
    shared.cluster.num_live, shared.cluster.num_waiting = 2, 0
    shared.cluster.predicted_s = None
    processor = shared.engine_client.output_processor
    await eventually(lambda: not shared.core.steps)
    assert not processor.request_states
    assert not processor.external_req_ids
    assert not processor.parent_requests
    await eventually(
        lambda: shared.app.state.server_load_metrics == 0
    )  # /load, counted down after the response


def error_of(response: httpx.Response) -> dict[str, object]:
    error: dict[str, object] = response.json()["error"]
    assert set(error) - {"reason"} == {"message", "type", "param", "code"}
    assert error["code"] == response.status_code
    return error


def events(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


class TestGeneration:
    async def test_completion(self, service: LocalService) -> None:
        answer = (await service.complete(max_tokens=30)).json()
        assert answer["choices"][0]["text"] == (ALPHABET * 2)[:30]
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 30

    async def test_completion_stream(self, service: LocalService) -> None:
        options = {"include_usage": True}
        answer = await service.complete(max_tokens=30, stream=True, stream_options=options)
        chunks = events(answer.text)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == (ALPHABET * 2)[:30]
        assert chunks[-1]["usage"]["completion_tokens"] == 30

    @pytest.mark.parametrize("stream", [False, True])
    async def test_chat(self, service: LocalService, stream: bool) -> None:
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": "tiny", "messages": messages, "max_tokens": 5, "stream": stream}
        answer = await service.http.post("/v1/chat/completions", json=body)
        if stream:
            said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in events(answer.text))
        else:
            said = answer.json()["choices"][0]["message"]["content"]
        assert said == "abcde"

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
    async def test_a_stream_is_resumed_after_its_last_event(self, service: LocalService, path: str) -> None:
        """With its first event, or what came before, left out: the client puts the texts together."""
        chat = {"messages": [{"role": "user", "content": "hello"}]} if "chat" in path else {"prompt": "x"}
        body = {"model": "tiny", "max_tokens": 30, "stream": True, **chat}

        async def ask(last: str) -> list[tuple[str, str]]:
            """Id and text of each event."""
            answer = await service.http.post(path, json=body, headers={"Last-Event-ID": last})
            *found, done = answer.text.removesuffix("\n\n").split("\n\n")
            assert done == "data: [DONE]"
            pairs = [event.removeprefix("id: ").split("\ndata: ") for event in found]
            choices = [(event_id, json.loads(data)["choices"][0]) for event_id, data in pairs]
            return [(i, c["text"] if "text" in c else c["delta"].get("content") or "") for i, c in choices]

        whole = await ask("0")
        assert "".join(text for _, text in whole) == (ALPHABET * 2)[:30]
        service.core.resumes = True
        for number, (last, _) in enumerate(whole):
            rest = await ask(last)
            assert "".join(text for _, text in rest) == "".join(text for _, text in whole[number + 1 :])
            assert rest[-1][0] == whole[-1][0]

    async def test_two_choices_are_two_requests_of_the_core(self, service: LocalService) -> None:
        answer = (await service.complete(max_tokens=4, n=2)).json()
        assert sorted(choice["text"] for choice in answer["choices"]) == ["ABCD", "abcd"]
        assert len(service.core.added) == 2

    async def test_stop_string_ends_the_request_at_the_core(self, service: LocalService) -> None:
        answer = (await service.complete(max_tokens=1000, stop=["de"])).json()
        assert answer["choices"][0]["text"] == "abc"
        assert service.core.aborted == [service.core.added[0].request_id]

    async def test_failure_of_a_request_is_an_error_to_its_client_only(self, service: LocalService) -> None:
        service.core.fails_after = 3
        assert error_of(await service.complete(max_tokens=9))["code"] == 500
        service.core.fails_after = None
        assert (await service.complete(max_tokens=2)).json()["choices"][0]["text"] == "ab"

    @pytest.mark.parametrize(("header", "body", "priority"), [({}, 7, 7), ({"X-Vllm-Priority": "-2"}, 7, -2)])
    async def test_priority_reaches_the_core(
        self, service: LocalService, header: dict[str, str], body: int, priority: int
    ) -> None:
        request = {"model": "tiny", "prompt": "x", "max_tokens": 1, "priority": body}
        assert (await service.http.post("/v1/completions", json=request, headers=header)).status_code == 200
        assert service.core.added[0].priority == priority

    async def test_request_id_goes_in_and_out(self, service: LocalService) -> None:
        headers = {"X-Request-Id": "my-id"}
        request = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        answer = await service.http.post("/v1/completions", json=request, headers=headers)
        assert answer.headers["X-Request-Id"] == "my-id"
        assert answer.json()["id"] == "cmpl-my-id"
        assert (await service.complete(max_tokens=1)).headers["X-Request-Id"]

    @pytest.mark.parametrize(
        ("path", "given"),
        [
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ("/v1/responses", {"input": "x"}),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    async def test_an_id_that_would_be_in_every_message_has_a_limit(
        self, service: LocalService, path: str, given: dict[str, object], stream: bool
    ) -> None:
        body = {"model": "tiny", **given}
        answer = await service.http.post(
            path, json=body | {"stream": stream}, headers={"X-Request-Id": "a" * 2000}
        )
        assert error_of(answer)["code"] == answer.status_code == 400
        assert "X-Request-Id has 2000 characters" in str(error_of(answer)["message"])
        assert not service.core.added

    @pytest.mark.parametrize(
        "body",
        [{"max_tokens": -1}, {"temperature": "hot"}, {"prompt": None}, {"max_tokens": 10**6}, {"n": 0}],
    )
    async def test_bad_input(self, service: LocalService, body: dict[str, object]) -> None:
        answer = await service.complete(**body)
        assert answer.status_code == 400
        error_of(answer)
        assert not service.core.added

    async def test_unknown_model(self, service: LocalService) -> None:
        assert error_of(await service.complete(model="other"))["code"] == 404


class TestOtherRoutes:
    async def test_models_version_ping_load(self, service: LocalService) -> None:
        assert [m["id"] for m in (await service.http.get("/v1/models")).json()["data"]] == ["tiny"]
        assert (await service.http.get("/version")).json()["version"]
        assert (await service.http.get("/ping")).status_code == 200

    async def test_tokenize_and_back(self, service: LocalService) -> None:
        answer = await service.http.post("/tokenize", json={"model": "tiny", "prompt": "hello"})
        tokens = answer.json()["tokens"]
        answer = await service.http.post("/detokenize", json={"model": "tiny", "tokens": tokens})
        assert answer.json()["prompt"].endswith("hello")

    async def test_load_counts_requests_in_progress(self, service: LocalService) -> None:
        service.core.running.clear()
        request = service.start(max_tokens=1)
        await service.taken()
        assert (await service.http.get("/load")).json() == {"server_load": 1}
        service.core.running.set()
        await request

    async def test_metrics_are_vllms(self, service: LocalService) -> None:
        await service.complete(max_tokens=3)
        text = (await service.http.get("/metrics")).text
        assert 'vllm:generation_tokens_total{engine="1",model_name="' in text
        assert 'http_requests_total{handler="/v1/completions"' in text

    async def test_health_follows_the_instances(self, service: LocalService) -> None:
        assert (await service.http.get("/health")).status_code == 200
        service.cluster.num_live = 0
        assert (await service.http.get("/health")).status_code == 503
        assert (await service.http.get("/ping")).status_code == 503
        service.cluster.num_live = 1
        assert (await service.http.get("/health")).status_code == 200


class TestOverload:
    async def test_too_many_waiting(self, service: LocalService) -> None:
        service.cluster.num_waiting = 4
        answer = await service.complete(max_tokens=1)
        assert error_of(answer)["code"] == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.headers["X-Request-Id"]
        service.cluster.num_waiting = 3
        assert (await service.complete(max_tokens=1)).status_code == 200

    async def test_a_burst_counts_although_the_cluster_has_seen_none_of_it(
        self, service: LocalService
    ) -> None:
        service.core.entrance.clear()
        burst = [service.start(max_tokens=1) for _ in range(20)]
        await eventually(lambda: sum(request.done() for request in burst) == 16)
        service.core.entrance.set()
        codes = [(await request).status_code for request in burst]
        assert (codes.count(200), codes.count(429)) == (4, 16)

    async def test_several_prompts_count_as_what_they_bring(self, service: LocalService) -> None:
        """Of four places they may take two, so that others are served beside them."""
        service.core.running.clear()
        several = service.start(prompt=["x"] * 2, max_tokens=1)
        await service.taken(2)
        service.cluster.num_waiting = 2  # as the cluster counts them now
        answer = await service.complete(prompt=["x"] * 2, max_tokens=1)
        assert error_of(answer)["code"] == 429
        assert answer.headers["Retry-After"]
        assert error_of(await service.complete(max_tokens=1, n=2))["code"] == 429
        single = service.start(max_tokens=1)
        await service.taken(3)
        service.core.running.set()
        assert [(await request).status_code for request in (several, single)] == [200, 200]

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("body", [{"prompt": ["x"] * 1000}, {"n": 3}, {"prompt": ["x"] * 2, "n": 2}])
    async def test_a_request_that_brings_too_much_is_told_so(
        self, service: LocalService, body: dict[str, object], stream: bool
    ) -> None:
        error = error_of(await service.complete(max_tokens=1, stream=stream, **body))
        assert error["code"] == 400
        assert "one request may bring 2" in str(error["message"])
        assert not service.core.added
        assert (await service.complete(max_tokens=1)).status_code == 200

    async def test_no_live_instance(self, service: LocalService) -> None:
        service.cluster.num_live = 0
        answer = await service.complete(max_tokens=1)
        assert error_of(answer)["code"] == 503
        assert answer.headers["Retry-After"]
        assert (await service.http.get("/v1/models")).status_code == 200

    @pytest.mark.parametrize("refused", [{"num_live": 0}, {"num_waiting": 4}])
    async def test_a_client_tries_again(self, service: LocalService, refused: dict[str, int]) -> None:
        """openai-python does so by itself, as late as `Retry-After` says."""
        for name, value in refused.items():
            setattr(service.cluster, name, value)
        codes: list[int] = []

        async def seen(response: httpx.Response) -> None:
            codes.append(response.status_code)
            service.cluster.num_live, service.cluster.num_waiting = 2, 0

        http = httpx.AsyncClient(event_hooks={"response": [seen]}, limits=LIMITS)
        url = f"{service.http.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=http) as client:
            answer = await client.completions.create(model="tiny", prompt="x", max_tokens=1)
        assert answer.choices[0].finish_reason == "length"
        assert codes == [503 if "num_live" in refused else 429, 200]

    @pytest.mark.parametrize("n", [1, 2])
    @pytest.mark.parametrize(
        ("refusal", "code"), [(EngineDeadError("no instance"), 503), (OverloadedError("full"), 429)]
    )
    async def test_refusal_by_the_core_leaves_nothing(
        self, service: LocalService, refusal: Exception, code: int, n: int
    ) -> None:
        service.core.refusal = refusal
        answer = await service.complete(max_tokens=1, n=n)
        assert error_of(answer)["code"] == code
        assert answer.headers["Retry-After"]

    @pytest.mark.parametrize("n", [1, 2])
    async def test_a_request_without_output_that_no_instance_takes(
        self, service: LocalService, n: int
    ) -> None:
        service.core.running.clear()
        request = service.start(max_tokens=5, n=n)
        await service.taken(n)
        service.engine_client.unavailable(service.core.added[0].request_id, "no instance")
        answer = await request
        assert (error_of(answer)["code"], answer.headers["Retry-After"]) == (503, "1")
        assert {r.request_id for r in service.core.added} <= set(service.core.aborted)

    @pytest.mark.parametrize(
        ("path", "prompt"),
        [
            ("/v1/completions", {"prompt": "x", "max_tokens": 5}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}),
            ("/v1/responses", {"input": "x"}),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_request_that_no_engine_can_serve(
        self, service: LocalService, path: str, prompt: dict[str, object], stream: bool
    ) -> None:
        service.core.running.clear()
        body = {"model": "tiny", "stream": stream} | prompt
        request = asyncio.create_task(service.http.post(path, json=body))
        await service.taken()
        service.engine_client.invalid(service.core.added[0].request_id, "no such grammar")
        answer = await request
        assert answer.status_code == (200 if stream else 400)
        assert "no such grammar" in answer.text
        assert {r.request_id for r in service.core.added} <= set(service.core.aborted)

    async def test_a_value_that_is_nested_too_deeply(
        self, service: LocalService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def check(*arguments: object, **named: object) -> None:
            raise RecursionError

        monkeypatch.setattr(service.engine_client.input_processor, "process_inputs", check)
        answer = await service.complete(max_tokens=1)
        assert (answer.status_code, error_of(answer)["type"]) == (400, "BadRequestError")


class TestTargets:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
    async def test_a_target_out_of_reach_is_refused_before_anything_is_sent(
        self, service: LocalService, path: str, stream: bool
    ) -> None:
        service.cluster.predicted_s = 5.5
        prompt = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
        del prompt["messages" if path == "/v1/completions" else "prompt"]
        body = {"model": "tiny", "max_tokens": 1, "stream": stream, **prompt}
        answer = await service.http.post(path, json=body, headers={"x-slo-ttft-ms": "3000"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (
            429,
            "slo_unattainable",
            "Too Many Requests",
        )
        assert answer.headers["Retry-After"] == "3"
        assert answer.headers["X-Request-Id"]
        assert not service.core.added
        late = await service.http.post(path, json=body, headers={"x-slo-ttft-ms": "6000"})
        assert late.status_code == 200
        assert (await service.http.post(path, json=body)).status_code == 200

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_refused_response_has_not_begun(self, service: LocalService, stream: bool) -> None:
        """vLLM sends the first events of its stream before it submits the request."""
        service.cluster.predicted_s = 5.5
        body = {"model": "tiny", "input": "x", "max_output_tokens": 1, "stream": stream}
        for target, status, code in (("nan", 400, 400), ("100", 429, "slo_unattainable")):
            answer = await service.http.post("/v1/responses", json=body, headers={"x-slo-ttft-ms": target})
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert not service.core.added

        answer = await service.http.post("/v1/responses", json=body, headers={"x-slo-ttft-ms": "6000"})

        assert answer.status_code == 200
        assert len(service.core.added) == 1

    async def test_a_refusal_is_no_error_in_the_log(
        self, service: LocalService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        logged: list[logging.LogRecord] = []
        for name in TRACEBACK_LOGGERS:
            handler = logging.Handler()
            monkeypatch.setattr(handler, "emit", logged.append)
            monkeypatch.setattr(logging.getLogger(name), "handlers", [handler])
        service.cluster.predicted_s = 5.5
        body = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
        late = {"x-slo-ttft-ms": "3000"}
        refused = await service.http.post("/v1/messages", json=body, headers=late)

        assert (refused.status_code, logged) == (429, [])
        assert (await service.http.post("/v1/messages", json=body)).status_code == 200

    async def test_the_openai_client_sends_targets_in_the_body(self, service: LocalService) -> None:
        service.cluster.predicted_s = 5.5
        url = f"{service.http.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            asked = {"model": "tiny", "prompt": "x", "max_tokens": 1}
            answer = await client.completions.create(**asked, extra_body={"vllm_xargs": {"slo_itl_ms": 50}})
            assert answer.choices[0].finish_reason == "length"
            with pytest.raises(openai.RateLimitError) as refused:
                await client.completions.create(**asked, extra_body={"vllm_xargs": {"slo_ttft_ms": 100}})
        assert refused.value.code == "slo_unattainable"

    @pytest.mark.parametrize(
        "headers",
        [
            [("x-slo-ttft-ms", "nan")],
            [("x-slo-itl-ms", "-3")],
            [("x-slo-ttft-ms", "1e99")],
            [("X-SLO-TTFT-MS", "100"), ("x-slo-ttft-ms", "200")],
        ],
    )
    async def test_nonsense_is_bad_input(self, service: LocalService, headers: list[tuple[str, str]]) -> None:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1, "stream": True}
        answer = await service.http.post("/v1/completions", json=body, headers=headers)
        assert error_of(answer)["code"] == 400
        assert not service.core.added

    async def test_one_of_several_prompts_that_is_refused_refuses_all(self, service: LocalService) -> None:
        service.cluster.predicted_s = 5.5
        body = {"prompt": ["x", "y"], "max_tokens": 1, "vllm_xargs": {"slo_ttft_ms": 100}}
        assert (await service.complete(**body)).json()["error"]["code"] == "slo_unattainable"
        assert not service.core.added
        assert (await service.complete(prompt=["x", "y"], max_tokens=1)).status_code == 200


class TestLimitsOfKeys:
    async def test_each_key_has_its_own_limit_and_every_prompt_counts(self, vllm_config) -> None:
        accounts = Accounts([KeyLimits(rpm=3), KeyLimits(rpm=100, tpm=10)], clock=time.monotonic)
        keys = ["alice", "bob"]
        body = {"model": "tiny", "max_tokens": 1}
        limited = running(
            vllm_config,
            *("--api-key", *keys),
            max_waiting=None,
            accounts=accounts,
            account=KeyAccounts(keys).current,
        )
        async with limited as service:

            async def ask(key: str, **more: object) -> httpx.Response:
                headers = {"Authorization": f"Bearer {key}"}
                return await service.http.post("/v1/completions", json=body | more, headers=headers)

            two = await ask("alice", prompt=["x", "y"])
            assert (two.status_code, two.headers["x-ratelimit-remaining-requests"]) == (200, "1")
            refused = await ask("alice", prompt=["x", "y"], stream=True)
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (429, "rate_limit_exceeded")
            assert 1 <= int(refused.headers["Retry-After"]) <= 20
            # The first prompt of the refused pair was given back.
            assert (await ask("alice", prompt="x", n=1)).status_code == 200
            assert (await ask("alice", prompt="x")).status_code == 429
            assert (await ask("bob", prompt="x" * 8)).status_code == 200
            used_up = await ask("bob", prompt="x" * 8)
            assert "10 tokens per minute" in used_up.json()["error"]["message"]
            assert int(used_up.headers["x-ratelimit-limit-tokens"]) == 10
            assert (await ask("eve", prompt="x")).status_code == 401
            assert len(service.core.added) == 4

    async def test_a_request_that_the_core_refuses_is_charged_nothing(self, vllm_config) -> None:
        accounts = Accounts([KeyLimits(rpm=1)], clock=time.monotonic)
        async with running(vllm_config, accounts=accounts) as service:
            service.core.refusal = EngineDeadError("no instance")
            assert (await service.complete(max_tokens=1)).status_code == 503
            service.core.refusal = None
            assert (await service.complete(max_tokens=1)).status_code == 200
            assert (await service.complete(max_tokens=1)).status_code == 429

    async def test_bad_input_is_charged_nothing(self, vllm_config) -> None:
        accounts = Accounts([KeyLimits(rpm=1)], clock=time.monotonic)
        async with running(vllm_config, accounts=accounts) as service:
            bad = await service.complete(max_tokens=1, structured_outputs={"regex": "("})
            assert bad.status_code == 400
            assert (await service.complete(max_tokens=1)).status_code == 200

    async def test_more_prompts_than_the_limit_pass_once_all_of_it_is_left(self, vllm_config) -> None:
        accounts = Accounts([KeyLimits(rpm=2)], clock=time.monotonic)
        async with running(vllm_config, max_waiting=None, accounts=accounts) as service:
            prompts = ["x", "y", "z"]
            assert (await service.complete(max_tokens=1, prompt=prompts)).status_code == 200
            refused = await service.complete(max_tokens=1, prompt=prompts)
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) > 30

    async def test_several_choices_are_several_requests(self, vllm_config) -> None:
        accounts = Accounts([KeyLimits(rpm=3)], clock=time.monotonic)
        async with running(vllm_config, accounts=accounts) as service:
            assert (await service.complete(max_tokens=1, n=2)).status_code == 200
            assert (await service.complete(max_tokens=1, n=2)).status_code == 429
            assert (await service.complete(max_tokens=1)).status_code == 200


class TestDisconnect:
    @pytest.mark.parametrize("n", [1, 2])
    @pytest.mark.parametrize("stream", [False, True])
    async def test_ends_a_running_request(self, service: LocalService, stream: bool, n: int) -> None:
        service.core.running.clear()
        request = service.start(max_tokens=50, stream=stream, n=n)
        await service.taken(n)
        request.cancel()
        await eventually(lambda: {r.request_id for r in service.core.added} <= set(service.core.aborted))

    @pytest.mark.parametrize("n", [1, 2])
    @pytest.mark.parametrize("stream", [False, True])
    async def test_while_the_core_has_not_taken_it(self, service: LocalService, stream: bool, n: int) -> None:
        service.core.entrance.clear()
        request = service.start(max_tokens=50, stream=stream, n=n)
        await eventually(lambda: len(service.engine_client.output_processor.request_states) == n)
        request.cancel()
        await eventually(lambda: len(service.core.aborted) >= n)

    async def test_in_the_middle_of_a_stream(self, service: LocalService) -> None:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "stream": True}
        async with service.http.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                break
        await eventually(lambda: bool(service.core.aborted))


class TestClusterRoutes:
    async def test_snapshot_has_no_infinity(self, service: LocalService) -> None:
        answer = (await service.http.get("/cluster")).json()
        assert answer["instances"][0]["freeness"] is None
        assert answer["migrations"] == {"handoff": {"committed": 3, "aborted": 1}}

    @pytest.mark.parametrize("named", ["my-id", "cmpl-my-id", "cmpl-my-id-0"])
    async def test_migrate_takes_any_name_of_a_request(self, service: LocalService, named: str) -> None:
        service.core.running.clear()
        body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
        headers = {"X-Request-Id": "my-id"}
        request = asyncio.create_task(service.http.post("/v1/completions", json=body, headers=headers))
        await service.taken()
        answer = await migrate(service, named, "d0")
        assert answer.json() == {"downtime_ms": 8.5, "stages": 2, "blocks": 4, "tokens": 120}
        assert service.cluster.moved[-1] == (service.core.added[0].request_id, "d0")
        service.core.running.set()
        assert (await request).json()["choices"][0]["text"] == "ab"

    async def test_the_clients_id_names_its_request_on_every_generating_route(self, vllm_config) -> None:
        """Whatever id vLLM's route makes; and it names no other one that begins with the same."""
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        bodies: dict[str, dict[str, object]] = {
            "/v1/completions": {"model": "tiny", "prompt": "x", "max_tokens": 2},
            "/v1/chat/completions": chat,
            "/v1/chat/completions/batch": chat | {"messages": [chat["messages"]]},
            "/v1/responses": {"model": "tiny", "input": "x", "max_output_tokens": 2},
            "/v1/messages": chat,
            "/inference/v1/generate": {
                "model": "tiny",
                "token_ids": [1],
                "sampling_params": {"max_tokens": 2},
            },
            "/invocations": chat,
            "/generative_scoring": {
                "model": "tiny",
                "query": "a",
                "items": ["b"],
                "label_token_ids": [65, 66],
            },
        }
        assert bodies.keys() >= GENERATING_PATHS - {"/cohere/v2/chat", "/v1/systemone"}
        async with running(vllm_config, "--enable-scale-out", max_waiting=100) as service:
            service.core.running.clear()
            requests = []
            streamed = [(path, body | {"stream": True}) for path, body in bodies.items() if "v1" in path]
            streamed = [(path, body) for path, body in streamed if "batch" not in path]
            for number, (path, body) in enumerate([*bodies.items(), *streamed]):
                headers = {"X-Request-Id": f"call-{number}"}
                post = service.http.post(path, json=body, headers=headers)
                requests.append(asyncio.create_task(post))
                await service.taken(number + 1)
            for number, added in enumerate(service.core.added):
                assert (await migrate(service, f"call-{number}", "d0")).status_code == 200
                assert service.cluster.moved[-1] == (added.request_id, "d0")
            assert service.engine_client.internal_ids("call") == []
            service.core.running.set()
            await asyncio.gather(*requests)

    async def test_requests_are_aborted_by_any_of_their_names(self, service: LocalService) -> None:
        service.core.running.clear()
        requests = [service.start(max_tokens=5, request_id=name) for name in ("one", "two")]
        await service.taken(2)  # or they count as waiting, and the next one is refused
        requests.append(service.start(max_tokens=5, n=2, request_id="pair"))
        await service.taken(4)
        client = service.engine_client
        assert await client.abort_named(["cmpl-one", "pair", "unknown"]) == 3
        assert await client.abort_all() == 1
        for answer in await asyncio.gather(*requests):
            assert {choice["finish_reason"] for choice in answer.json()["choices"]} == {"abort"}

    async def test_migrate_of_two_choices_must_say_which(self, service: LocalService) -> None:
        service.core.running.clear()
        request = service.start(max_tokens=1, n=2, request_id="pair")
        await service.taken(2)
        error = error_of(await migrate(service, "pair", "d0"))
        assert (error["code"], error["reason"]) == (409, "ambiguous_request")
        child = service.core.added[1].request_id
        assert child in str(error["message"])
        assert (await migrate(service, child, "d0")).status_code == 200
        service.core.running.set()
        await request

    async def test_migrate_unknown_or_refused(self, service: LocalService) -> None:
        assert error_of(await migrate(service, "gone", "d0"))["code"] == 404
        assert error_of(await migrate(service, "x", "d7"))["code"] == 404
        refused = error_of(await migrate(service, "x", "p0"))
        assert (refused["code"], refused["message"]) == (409, "p0 has 3 free blocks and the request needs 9")
        assert refused["reason"] == "no_free_blocks"
        assert error_of(await migrate(service, "elsewhere", "d0"))["code"] == 503

    @pytest.mark.parametrize(
        "content", ["{", "[]", '{"request_id": "x"}', '{"request_id": 3, "destination": 4}', b"\x80"]
    )
    async def test_migrate_bad_input(self, service: LocalService, content: str | bytes) -> None:
        headers = {"Content-Type": "application/json"}
        answer = await service.http.post("/cluster/migrate", content=content, headers=headers)
        assert error_of(answer)["code"] == 400

    @pytest.mark.parametrize(
        ("body", "asked"),
        [
            ({"instance": "d0"}, ("d0", True, False)),
            ({"instance": "d0", "stop": True}, ("d0", True, True)),
            ({"instance": "d0", "draining": False}, ("d0", False, False)),
        ],
    )
    async def test_drain(
        self, service: LocalService, body: dict[str, object], asked: tuple[str, bool, bool]
    ) -> None:
        answer = await service.http.post("/cluster/drain", json=body)
        assert answer.status_code == 202
        assert service.cluster.drained.pop() == asked
        assert answer.json() == {"draining": True, "stop": False, **body}

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            ({"decode": 4}, 202),
            ({"encode": 4}, 400),
            ({"decode": "many"}, 400),
            ({"decode": -1}, 400),
            ({"decode": 10**30}, 400),
            ({"prefill": 4}, 409),
            ({"neutral": 1}, 503),
        ],
    )
    async def test_scale(self, service: LocalService, body: dict[str, object], status: int) -> None:
        answer = await service.http.post("/cluster/scale", json=body)
        assert answer.status_code == status
        if status == 202:
            assert service.cluster.sizes == answer.json() == body
        else:
            assert answer.json()["error"]["code"] == status

    async def test_restart_once_at_a_time(self, service: LocalService) -> None:
        service.cluster.restarts = 0
        bodies: list[dict[str, bool] | None] = [None, {}, {"cancel": True}, {"cancel": False}]
        answers = [await service.http.post("/cluster/restart", json=body) for body in bodies]
        assert [answer.status_code for answer in answers] == [202, 409, 202, 202]

    @pytest.mark.parametrize(("instance", "status"), [("p0", 409), ("d7", 404), ("", 400)])
    async def test_drain_refused(self, service: LocalService, instance: str, status: int) -> None:
        answer = await service.http.post("/cluster/drain", json={"instance": instance})
        assert answer.status_code == status
        assert error_of(answer)["code"] == status
        assert not service.cluster.drained

    async def test_an_instance_that_is_used_again_cannot_stop(self, service: LocalService) -> None:
        body = {"instance": "d0", "draining": False, "stop": True}
        answer = await service.http.post("/cluster/drain", json=body)
        assert (answer.status_code, error_of(answer)["param"]) == (400, "stop")
        assert not service.cluster.drained

    async def test_timeline(self, service: LocalService) -> None:
        found = (await service.http.get("/cluster/requests/mine")).json()
        assert (found["id"], [r["state"] for r in found["requests"]]) == ("mine", ["decode"])
        unknown = error_of(await service.http.get("/cluster/requests/nobody-s"))
        assert (unknown["code"], unknown["param"]) == (404, "request_id")
        assert error_of(await service.http.get("/cluster/requests/elsewhere"))["code"] == 503
        assert error_of(await service.http.get("/cluster/requests/two%0Alines/and%20more"))["code"] == 404

    async def test_integrity(self, service: LocalService) -> None:
        assert (await service.http.get("/cluster/integrity")).json() == {"ok": True, "violations": []}
        service.cluster.violations = ["d0: 3 blocks belong to nobody"]
        answer = (await service.http.get("/cluster/integrity")).json()
        assert answer == {"ok": False, "violations": ["d0: 3 blocks belong to nobody"]}
        service.cluster.violations = []


async def migrate(service: LocalService, request_id: str, destination: str) -> httpx.Response:
    body = {"request_id": request_id, "destination": destination}
    return await service.http.post("/cluster/migrate", json=body)


class TestServer:
    async def test_api_key_guards_cluster_routes_too(self, vllm_config) -> None:
        async with running(vllm_config, "--api-key", "one", "two") as service:
            for path in ("/cluster", "/cluster/integrity", "/v1/models"):
                assert (await service.http.get(path)).status_code == 401
                wrong = await service.http.get(path, headers={"Authorization": "Bearer three"})
                assert wrong.status_code == 401
                right = await service.http.get(path, headers={"Authorization": "Bearer two"})
                assert right.status_code == 200
            assert (await service.http.get("/cluster")).json() == {"error": "Unauthorized"}
            assert (await migrate(service, "x", "d0")).status_code == 401
            service.cluster.num_live = 0
            assert (await service.complete()).status_code == 401
            assert (await service.http.get("/health")).status_code == 503

    async def test_the_admin_key_replaces_the_api_key_for_cluster_routes(self, vllm_config) -> None:
        async with running(vllm_config, "--api-key", "one", admin_key="boss") as service:
            opens = {("/cluster", "boss"): 200, ("/cluster", "one"): 401, ("/v1/models", "boss"): 401}
            for (path, key), status in opens.items():
                answer = await service.http.get(path, headers={"Authorization": f"Bearer {key}"})
                assert answer.status_code == status

    async def test_stop_ends_open_streams_in_time(self, vllm_config) -> None:
        async with running(vllm_config) as service:
            stream = service.start(max_tokens=4000, stream=True)
            await service.taken()
            began = asyncio.get_running_loop().time()
            service.serving.cancel()
            await asyncio.wait({service.serving})
            assert asyncio.get_running_loop().time() - began < 3.5
            assert events((await stream).text)[-1]["choices"][0]["finish_reason"] == "abort"
            assert service.serving.cancelled()

    async def test_stop_lets_short_requests_finish(self, vllm_config) -> None:
        async with running(vllm_config) as service:
            request = service.start(max_tokens=100)
            await service.taken()
            service.serving.cancel()
            await asyncio.wait({service.serving})
            assert (await request).json()["usage"]["completion_tokens"] == 100

    async def test_dead_engine_client_ends_the_server(self, vllm_config) -> None:
        async with running(vllm_config) as service:
            service.core.running.clear()
            request = service.start(max_tokens=1)
            await service.taken()
            service.core.die()
            assert error_of(await request)["code"] == 500
            with pytest.raises(EngineDeadError):
                await asyncio.wait_for(service.serving, 8)


class TestBind:
    async def test_busy_port_is_one_line(self) -> None:
        with bind("127.0.0.1", 0) as first:
            first.listen()
            port = first.getsockname()[1]
            with pytest.raises(InvalidRequestError) as caught:
                bind("127.0.0.1", port)
        assert str(caught.value) == f"port {port} of 127.0.0.1 is in use; choose another with --port"

    @pytest.mark.parametrize(
        ("host", "port"), [("no-such-host.invalid", 8000), ("192.0.2.1", 8000), ("127.0.0.1", 70_000)]
    )
    async def test_impossible_address_is_one_line(self, host: str, port: int) -> None:
        with pytest.raises(InvalidRequestError, match=f"port {port} of {host}"):
            bind(host, port)

    async def test_clients_are_refused_until_the_service_is_ready(self) -> None:
        with bind(None, 0) as sock, pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", sock.getsockname()[1])

    async def test_a_port_can_be_used_again_at_once(self, vllm_config: object) -> None:
        async with running(vllm_config) as service:
            assert (await service.http.get("/health")).status_code == 200
            port = service.http.base_url.port
        bind("127.0.0.1", port).close()
