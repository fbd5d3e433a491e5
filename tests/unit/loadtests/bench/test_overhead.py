"""The overhead benchmark: command lines, load, summary, and what is left when a server fails."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import psutil
import pytest
from aiohttp import web

from loadtests.bench.overhead import Load, Measured, PairedRound, put_load, summary
from loadtests.bench.servers import OURS, STOCK, Server, Settings, as_flags, running
from pd_serve.errors import PdServeError


def test_settings_become_vllms_flags() -> None:
    values = {"block_size": 32, "enforce_eager": True, "use_tqdm_on_load": False, "dtype": "float32"}

    assert as_flags(values) == [
        "--block-size=32",
        "--enforce-eager",
        "--no-use-tqdm-on-load",
        "--dtype=float32",
    ]


def test_both_command_lines_have_the_same_flags() -> None:
    settings = Settings("model-directory", ["--block-size=32", "--dtype=float32"], {})

    ours, stock = settings.command(OURS, 1234), settings.command(STOCK, 1234)

    assert [flag for flag in ours if flag not in stock][-1] == "--neutral=1"
    shared = [
        "--served-model-name=tiny",
        "--host=127.0.0.1",
        "--port=1234",
        "--block-size=32",
        "--dtype=float32",
    ]
    assert ours[-5:] == stock[-5:] == shared


def _round(ours: tuple[float, float], stock: tuple[float, float]) -> PairedRound:
    return PairedRound(OURS, Measured(*ours, 1.0, 1.0), Measured(*stock, 1.0, 1.0))


def test_the_summary_is_the_median_over_pairs_not_the_ratio_of_medians() -> None:
    pairs = [_round((90, 12), (100, 10)), _round((200, 30), (200, 29)), _round((50, 10), (40, 13))]

    result = summary({Load(1, 3): pairs, Load(8, 3): pairs[:1]})

    assert result == {"throughput_ratio": {"1": 1.0, "8": 0.9}, "ttft_added_ms": {"1": 1.0, "8": 2.0}}


@dataclass
class FakeServer:
    """Streams what vLLM would; counts what it is asked at a time."""

    token_delay_s: float = 0.001
    tokens_short: int = 0
    status: int = 200
    at_a_time: int = 0
    most_at_a_time: int = 0
    prompts: list[list[int]] = field(default_factory=list)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        if self.status != 200:
            return web.Response(status=self.status, reason="not now")
        body = await request.json()
        assert body["stream"]
        assert body["ignore_eos"]
        self.prompts.append(body["prompt"])
        self.at_a_time += 1
        self.most_at_a_time = max(self.most_at_a_time, self.at_a_time)
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
        self.at_a_time -= 1
        return response


@pytest.fixture
async def fake() -> FakeServer:
    return FakeServer()


@pytest.fixture
async def server(fake: FakeServer) -> AsyncIterator[Server]:
    app = web.Application()
    app.router.add_post("/v1/completions", fake.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    yield Server(f"http://127.0.0.1:{port}", psutil.Process())
    await runner.cleanup()


LOAD = Load(num_clients=3, num_requests=7, prompt_tokens=4, output_tokens=5)


async def test_every_client_sends_its_next_request_when_the_last_has_ended(
    fake: FakeServer, server: Server
) -> None:
    measured = await put_load(server, LOAD, seed=1)

    assert len(fake.prompts) == 7
    assert fake.most_at_a_time == 3
    assert measured.output_tokens_per_s < 3 / fake.token_delay_s
    assert measured.ttft_ms >= 1.0
    assert measured.itl_ms > 0


async def test_the_same_seed_sends_the_same_prompts_and_another_one_does_not(
    fake: FakeServer, server: Server
) -> None:
    for seed in (1, 1, 2):
        await put_load(server, LOAD, seed)

    assert sorted(fake.prompts[:7]) == sorted(fake.prompts[7:14])
    assert sorted(fake.prompts[:7]) != sorted(fake.prompts[14:])


async def test_a_refused_request_ends_the_benchmark(fake: FakeServer, server: Server) -> None:
    fake.status = 503

    with pytest.raises(PdServeError, match="not now"):
        await put_load(server, LOAD, seed=1)


async def test_a_request_that_brings_too_few_tokens_ends_the_benchmark(
    fake: FakeServer, server: Server
) -> None:
    fake.tokens_short = 1

    with pytest.raises(PdServeError, match="4 tokens came"):
        await put_load(server, LOAD, seed=1)


@dataclass(frozen=True, slots=True)
class Scripted(Settings):
    """Starts a script in place of a server."""

    script: str = ""

    def command(self, name: str, port: int) -> list[str]:
        return [sys.executable, "-c", self.script, str(port)]


async def test_a_server_that_does_not_come_up_is_quoted() -> None:
    settings = Scripted("", [], {}, "print('starting'); print('no such model'); raise SystemExit(1)")

    with pytest.raises(PdServeError, match=r"vllm did not come up.*no such model"):
        async with running(STOCK, settings):
            pytest.fail("it is not up")


async def test_a_server_ends_with_the_block_that_it_runs_in() -> None:
    script = (
        "import sys; from http.server import *; "
        "Handler = type('H', (BaseHTTPRequestHandler,), "
        "{'do_GET': lambda self: (self.send_response(200), self.end_headers())}); "
        "HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()"
    )

    async with running(OURS, Scripted("", [], {}, script)) as server:
        process = server.process
        assert process.is_running()
        assert server.cpu_s() > 0

    assert not process.is_running()
