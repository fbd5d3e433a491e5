"""The gate in front of generating routes, over an application that does what the test tells it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx
import pytest
from fastapi import HTTPException
from prometheus_client import REGISTRY
from starlette.types import Message, Receive, Scope, Send

from pd_serve.api.overload import (
    GENERATING_PATHS,
    OverloadMiddleware,
    announce,
    announce_tokens,
    arriving_tokens,
    give_charges_back,
    mark_submitted,
    note_charge,
    note_headers,
    note_refusal,
)
from pd_serve.errors import InvalidRequestError, OverloadedError, RequestRefusedError

Handler = Callable[[Receive, Send], Awaitable[None]]


@dataclass
class Cluster:
    num_live: int = 1
    num_waiting: int = 0
    num_waiting_elsewhere: int = 0

    @property
    def takes_requests(self) -> bool:
        return self.num_live > 0


class App:
    """An ASGI application that reads the body, waits, hands the request over, waits and answers.

    Attributes:
        read: Bodies read so far; `tokenized` and `answered` let all requests pass that point.
    """

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.read = self.submitted = 0
        self.tokenized, self.answered = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body", False):
            pass
        self.read += 1
        await self.tokenized.wait()
        mark_submitted()
        self.submitted += 1
        await self.answered.wait()
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    def open(self) -> "App":
        self.tokenized.set()
        self.answered.set()
        return self


def client(gate: OverloadMiddleware) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://test")


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("path", sorted(GENERATING_PATHS))
async def test_every_generating_route_is_guarded(path: str) -> None:
    gate = OverloadMiddleware(App().open(), cluster=Cluster(num_waiting=2), max_waiting=2)
    async with client(gate) as http:
        answer = await http.post(path)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("Too Many Requests", None, 429)


async def test_a_closed_gate_answers_503_whatever_the_cluster_says() -> None:
    gate = OverloadMiddleware(App().open(), cluster=Cluster())
    gate.is_closed = True
    async with client(gate) as http:
        assert (await http.post("/v1/completions")).status_code == 503


async def test_requests_that_wait_at_other_api_servers_count() -> None:
    cluster = Cluster(num_waiting=1, num_waiting_elsewhere=3)
    gate = OverloadMiddleware(App().open(), cluster=cluster, max_waiting=4)
    async with client(gate) as http:
        assert (await http.post("/v1/completions")).status_code == 429
        cluster.num_waiting_elsewhere = 2
        assert (await http.post("/v1/completions")).text == "done"
    assert gate.num_waiting == 1, "what it tells the others is its own only"


async def test_each_429_is_told_and_no_503() -> None:
    told: list[int] = []
    cluster = Cluster(num_waiting=2)

    def gate(app: App) -> OverloadMiddleware:
        return OverloadMiddleware(app.open(), cluster=cluster, max_waiting=2, on_429=lambda: told.append(1))

    async with client(gate(App())) as http:
        assert (await http.post("/v1/completions")).status_code == 429
        cluster.num_waiting, cluster.num_live = 0, 0
        assert (await http.post("/v1/completions")).status_code == 503
    cluster.num_live = 1
    async with client(gate(App(429))) as http:
        assert (await http.post("/v1/completions")).status_code == 429
    assert told == [1, 1]


async def test_below_the_limit_and_without_one() -> None:
    async with client(
        OverloadMiddleware(App().open(), cluster=Cluster(num_waiting=1), max_waiting=2)
    ) as http:
        assert (await http.post("/v1/completions")).text == "done"
    async with client(OverloadMiddleware(App().open(), cluster=Cluster(num_waiting=10**6))) as http:
        assert (await http.post("/v1/completions")).text == "done"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/health"), ("GET", "/v1/completions"), ("POST", "/tokenize"), ("POST", "/cluster/migrate")],
)
async def test_other_requests_pass_untouched(method: str, path: str) -> None:
    seen: list[tuple[Receive, Send]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((receive, send))

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None: ...

    gate = OverloadMiddleware(app, cluster=Cluster(num_live=0, num_waiting=99), max_waiting=1)
    await gate({"type": "http", "method": method, "path": path}, receive, send)
    assert seen == [(receive, send)]


async def test_no_live_instance_goes_before_overload() -> None:
    gate = OverloadMiddleware(App().open(), cluster=Cluster(num_live=0, num_waiting=9), max_waiting=1)
    async with client(gate) as http:
        answer = await http.post("/v1/chat/completions")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")


async def test_path_below_a_root_path() -> None:
    gate = OverloadMiddleware(App().open(), cluster=Cluster(num_live=0))
    transport = httpx.ASGITransport(gate, root_path="/llm")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert (await http.post("/llm/v1/completions")).status_code == 503


@pytest.mark.parametrize(("status", "hint"), [(429, "1"), (503, "1"), (500, None), (200, None)])
async def test_refusals_from_further_inside_get_the_hint(status: int, hint: str | None) -> None:
    async with client(OverloadMiddleware(App(status).open(), cluster=Cluster())) as http:
        answer = await http.post("/v1/completions")
    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, hint)


class TestArriving:
    async def test_counts_from_the_complete_body_to_the_hand_over(self) -> None:
        app = App()
        gate = OverloadMiddleware(app, cluster=Cluster(num_waiting=1), max_waiting=3)
        async with client(gate) as http:
            requests = [asyncio.create_task(http.post("/v1/completions")) for _ in range(5)]
            await settle()
            assert (app.read, len(gate.arriving)) == (2, 2)
            app.tokenized.set()
            await settle()
            assert (app.submitted, len(gate.arriving)) == (2, 0)
            app.answered.set()
            codes = [(await request).status_code for request in requests]
        assert codes == [200, 200, 429, 429, 429]
        assert len(gate.arriving) == 0

    async def test_slow_uploads_take_no_place(self) -> None:
        rest = asyncio.Event()

        app = App()
        gate = OverloadMiddleware(app, cluster=Cluster(), max_waiting=1)
        receiving = asyncio.Event()

        async def receive() -> Message:
            if not receiving.is_set():
                receiving.set()
                return {"type": "http.request", "body": b"{", "more_body": True}
            await rest.wait()
            return {"type": "http.request", "body": b"}"}

        async def send(message: Message) -> None: ...

        scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
        upload = asyncio.create_task(gate(scope, receive, send))
        await receiving.wait()
        assert len(gate.arriving) == 0
        rest.set()
        await settle()
        assert len(gate.arriving) == 1
        app.open()
        await upload

    async def test_uploads_that_end_together_take_no_more_places_than_there_are(self) -> None:
        """All of them were let in while none counted."""
        app, rest = App(), asyncio.Event()
        gate = OverloadMiddleware(app, cluster=Cluster(), max_waiting=2)

        async def receive() -> Message:
            await rest.wait()
            return {"type": "http.request", "body": b"{}"}

        async def send(message: Message) -> None: ...

        scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
        uploads = [asyncio.create_task(gate(scope, receive, send)) for _ in range(5)]
        await settle()
        rest.set()
        await settle()
        assert (app.read, len(gate.arriving)) == (2, 2)
        app.open()
        ended = await asyncio.gather(*uploads, return_exceptions=True)
        refused = [error for error in ended if isinstance(error, HTTPException)]
        assert [error.status_code for error in refused] == [429] * 3
        assert ended.count(None) == 2
        assert len(gate.arriving) == 0

    @pytest.mark.parametrize("handed_over", [False, True])
    async def test_is_over_when_the_request_is_cancelled(self, handed_over: bool) -> None:
        app = App()
        gate = OverloadMiddleware(app, cluster=Cluster(), max_waiting=3)
        if handed_over:
            app.tokenized.set()
        async with client(gate) as http:
            request = asyncio.create_task(http.post("/v1/completions"))
            await settle()
            assert len(gate.arriving) == (0 if handed_over else 1)
            request.cancel()
            await asyncio.wait({request})
        assert len(gate.arriving) == 0

    async def test_is_over_when_the_application_fails(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            raise RuntimeError

        gate = OverloadMiddleware(app, cluster=Cluster(), max_waiting=1)
        async with client(gate) as http:
            for _ in range(3):
                with pytest.raises(RuntimeError):
                    await http.post("/v1/completions")
        assert len(gate.arriving) == 0

    async def test_is_seen_from_tasks_that_the_application_starts(self) -> None:
        gate: OverloadMiddleware

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async def handler() -> None:
                while (await receive()).get("more_body", False):
                    pass
                assert len(gate.arriving) == 1
                mark_submitted()
                assert len(gate.arriving) == 0

            await asyncio.create_task(handler())
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})

        gate = OverloadMiddleware(app, cluster=Cluster(), max_waiting=1)
        async with client(gate) as http:
            assert (await http.post("/v1/completions")).status_code == 200

    async def test_outside_of_a_request_there_is_nothing_to_mark(self) -> None:
        mark_submitted()


async def test_a_stream_goes_out_chunk_by_chunk() -> None:
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for index in range(3):
            await send({"type": "http.response.body", "body": b"x", "more_body": index < 2})
            assert len(sent) == index + 2

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    gate = OverloadMiddleware(app, cluster=Cluster())
    await gate({"type": "http", "method": "POST", "path": "/v1/completions"}, receive, send)
    assert len(sent) == 4


class TestSeveral:
    """Of 8 places, HTTP requests that bring several requests may take 4."""

    @staticmethod
    async def bring(gate: OverloadMiddleware, *numbers: int) -> None:
        """One HTTP request that brings requests in these groups, as vLLM's handlers do before they submit."""
        raised: list[Exception] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            try:
                for number in numbers:
                    announce(number)
            except Exception as error:
                raised.append(error)
            before = gate.num_waiting
            for number in numbers:
                mark_submitted(number)
            assert raised or gate.num_waiting == before - sum(numbers)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})

        gate.app = app
        async with client(gate) as http:
            await http.post("/v1/completions")
        assert not gate.arriving
        if raised:
            raise raised[0]

    @pytest.mark.parametrize("numbers", [(1,), (4,), (1, 1, 1, 1), (2, 2)])
    async def test_within_their_half_they_are_served(self, numbers: tuple[int, ...]) -> None:
        await self.bring(OverloadMiddleware(App(), cluster=Cluster(), max_waiting=8), *numbers)

    @pytest.mark.parametrize("numbers", [(5,), (1,) * 1000, (4, 1)])
    async def test_more_than_that_is_the_clients_mistake(self, numbers: tuple[int, ...]) -> None:
        with pytest.raises(InvalidRequestError, match="one request may bring 4"):
            await self.bring(OverloadMiddleware(App(), cluster=Cluster(), max_waiting=8), *numbers)

    async def test_while_others_wait_they_are_refused_before_single_ones(self) -> None:
        gate = OverloadMiddleware(App(), cluster=Cluster(num_waiting=3), max_waiting=8)
        await self.bring(gate, 1)
        with pytest.raises(OverloadedError, match="3 requests are already waiting"):
            await self.bring(gate, 2)

    async def test_without_a_limit_all_are_served(self) -> None:
        await self.bring(OverloadMiddleware(App(), cluster=Cluster()), 10_000)

    async def test_a_task_that_outlives_its_http_request_counts_no_more(self) -> None:
        late: list[asyncio.Task[None]] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()

            async def later() -> None:
                await asyncio.sleep(0.01)
                announce(1)

            late.append(asyncio.create_task(later()))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})

        gate = OverloadMiddleware(app, cluster=Cluster(), max_waiting=8)
        async with client(gate) as http:
            await http.post("/v1/responses")
        await late[0]
        assert not gate.arriving


# ---- refusals with a reason


class Refusing:
    """An application whose cluster refuses the request when its prompt is known, as vLLM answers that."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body", False):
            pass
        announce(1)
        note_refusal(RequestRefusedError("try later", "slo_unattainable", 7))
        body = b'{"error": "as vLLM says it"}'
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def refused(status: str, reason: str) -> float:
    labels = {"status": status, "reason": reason}
    return REGISTRY.get_sample_value("pd_serve_refused_requests_total", labels) or 0.0


async def test_a_refusal_with_a_reason_is_answered_with_it_and_counted() -> None:
    gate = OverloadMiddleware(Refusing(), cluster=Cluster())
    before = refused("429", "slo_unattainable")
    async with client(gate) as http:
        answer = await http.post("/v1/completions")

    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "7")
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["message"]) == (
        "slo_unattainable",
        "Too Many Requests",
        "try later",
    )
    assert refused("429", "slo_unattainable") == before + 1
    assert not gate.arriving


async def test_a_refusal_keeps_the_format_of_another_api() -> None:
    async with client(OverloadMiddleware(Refusing(), cluster=Cluster())) as http:
        answer = await http.post("/v1/messages")

    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "7")
    assert answer.json() == {"error": "as vLLM says it"}


@pytest.mark.parametrize(
    ("cluster", "reason"),
    [(Cluster(num_live=0), "503 no_instance"), (Cluster(num_waiting=2), "429 overloaded")],
)
async def test_other_refusals_are_counted_by_their_status(cluster: Cluster, reason: str) -> None:
    status, name = reason.split()
    before = refused(status, name)
    async with client(OverloadMiddleware(App().open(), cluster=cluster, max_waiting=2)) as http:
        assert (await http.post("/v1/completions")).status_code == int(status)

    assert refused(status, name) == before + 1


async def test_an_answer_is_counted_as_no_refusal() -> None:
    before = [refused("429", "overloaded"), refused("503", "no_instance")]
    async with client(OverloadMiddleware(App().open(), cluster=Cluster())) as http:
        await http.post("/v1/completions")

    assert before == [refused("429", "overloaded"), refused("503", "no_instance")]


async def test_prompts_count_for_others_until_the_cluster_counts_them() -> None:
    seen: list[int] = []
    gate: OverloadMiddleware

    class Announcing(App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            seen.append(arriving_tokens())
            announce(2)
            announce_tokens(300)
            if len(seen) == 2:
                mark_submitted(1, 100)
                seen.append(arriving_tokens())
            await self.answered.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    app = Announcing()
    gate = OverloadMiddleware(app, cluster=Cluster())
    async with client(gate) as http:
        first = asyncio.create_task(http.post("/v1/completions"))
        await settle()
        second = asyncio.create_task(http.post("/v1/completions"))
        await settle()
        app.answered.set()
        await asyncio.gather(first, second)
        assert seen == [0, 300, 500]
        await http.post("/v1/completions")
        assert seen[-1] == 0, "what an HTTP request has announced ends with it"
    assert arriving_tokens() == 0


# ---- charges of accounts


class Charging:
    """An application that charges for two prompts, and refuses the second one or not."""

    def __init__(self, *, refuses: bool) -> None:
        self.charged = 0
        self._refuses = refuses

    def _give_back(self) -> None:
        self.charged -= 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        announce(1)
        self.charged += 1
        note_charge(self._give_back, 1, 10)
        note_headers({"x-ratelimit-remaining-requests": "7"})
        if self._refuses:
            give_charges_back()
            give_charges_back()
            note_refusal(RequestRefusedError("no more", "rate_limit_exceeded", 20))
        await send({"type": "http.response.start", "status": 429 if self._refuses else 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("refuses", [False, True])
async def test_a_refused_request_is_charged_nothing_and_each_answer_says_what_is_left(refuses: bool) -> None:
    app = Charging(refuses=refuses)
    async with client(OverloadMiddleware(app, cluster=Cluster())) as http:
        answer = await http.post("/v1/completions")

    assert answer.headers["x-ratelimit-remaining-requests"] == "7"
    assert (answer.status_code, app.charged) == ((429, 0) if refuses else (200, 1))
    if refuses:
        assert (answer.headers["Retry-After"], answer.json()["error"]["code"]) == (
            "20",
            "rate_limit_exceeded",
        )
