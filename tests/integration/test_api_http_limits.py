"""What one client may make the server hold, over real sockets; and TLS."""

import asyncio
import json
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from pd_serve.api import http_limits
from tests.integration.test_api_app import LocalService, error_of, eventually, running, vllm_config  # noqa: F401

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

BODY_BYTES, HEADER_BYTES, HEADERS, CONNECTIONS = 50_000, 20_000, 40, 8
FLAGS = [f"--h11-max-incomplete-event-size={HEADER_BYTES}", f"--h11-max-header-count={HEADERS}"]
COMPLETION = {"model": "tiny", "prompt": "x", "max_tokens": 3}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def service(vllm_config: Any) -> AsyncIterator[LocalService]:  # noqa: F811
    limits = {"max_body_bytes": BODY_BYTES, "max_connections": CONNECTIONS, "max_waiting": 100}
    async with running(vllm_config, *FLAGS, **limits) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def serves_on(service: LocalService) -> AsyncIterator[None]:
    """Whatever happened: the next client is served."""
    yield
    await eventually(lambda: len(service.app.state.server.server_state.connections) <= 1)
    assert (await service.complete(max_tokens=3)).json()["choices"][0]["text"] == "abc"


@asynccontextmanager
async def connection(
    service: LocalService,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.http.base_url.port)
    try:
        async with asyncio.timeout(90):
            yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):  # the server may have closed first
            await writer.wait_closed()


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and the error of what comes until the server closes."""
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, json.loads(body)["error"]


def padded(size: int) -> bytes:
    """A good request of a number of bytes: JSON may end in spaces."""
    return json.dumps(COMPLETION).encode().ljust(size)


async def in_chunks(data: bytes) -> AsyncIterator[bytes]:
    for begin in range(0, len(data), 7000):
        yield data[begin : begin + 7000]


class TestBodies:
    @pytest.mark.parametrize("chunked", [False, True])
    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
    async def test_too_long(self, service: LocalService, chunked: bool, path: str) -> None:
        body = padded(BODY_BYTES + 1)
        content: Any = in_chunks(body) if chunked else body
        answer = await service.http.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert error_of(answer)["message"] == "The body of the request is longer than 50000 bytes."
        assert error_of(answer)["type"] == "Request Entity Too Large"

    @pytest.mark.parametrize("chunked", [False, True])
    async def test_just_not_too_long(self, service: LocalService, chunked: bool) -> None:
        content: Any = in_chunks(padded(BODY_BYTES)) if chunked else padded(BODY_BYTES)
        headers = {"content-type": "application/json"}
        answer = await service.http.post("/v1/completions", content=content, headers=headers)
        assert answer.json()["choices"][0]["text"] == "abc"

    async def test_one_byte_chunks_are_a_body_like_others(self, service: LocalService) -> None:
        """Their framing is no header, however much of it there is."""
        body = padded(8000)
        async with connection(service) as (reader, writer):
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            writer.write(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")

    @pytest.mark.parametrize("chunk", [b"size\r\n", b"2\r\n{}{}", b"2\r\n{}\r\n-1\r\n"])
    @pytest.mark.parametrize("late", [False, True])
    async def test_a_chunk_that_is_none(self, service: LocalService, chunk: bytes, late: bool) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        async with connection(service) as (reader, writer):
            writer.write(head)
            if late:  # its handler waits for the body
                await eventually(lambda: bool(service.app.state.server.server_state.tasks))
            writer.write(chunk)
            status, headers, error = await answer_of(reader)
        assert (status, headers["connection"]) == (400, "close")
        assert error["message"] == "Invalid HTTP request received."

    async def test_a_prompt_that_is_too_long(self, service: LocalService) -> None:
        answer = await service.complete(prompt=[1] * 20_000)
        assert answer.status_code == 400
        assert "maximum context length" in str(error_of(answer)["message"])


class TestHeaders:
    async def test_too_many(self, service: LocalService) -> None:
        async with connection(service) as (reader, writer):
            lines = "".join(f"x-{i}: 1\r\n" for i in range(HEADERS + 1))
            writer.write(f"GET /health HTTP/1.1\r\n{lines}\r\n".encode())
            status, headers, error = await answer_of(reader)
        assert (status, error["code"]) == (431, 431)
        assert error["message"] == "The request has more than 40 headers."
        assert headers["connection"] == "close"

    @pytest.mark.parametrize(
        "begin",
        [
            b"GET /health HTTP/1.1\r\nx: ",
            b"GET /health HTTP/1.1\r\n",
            b"GET /health?",
        ],
        ids=["a value", "a name", "the path"],
    )
    async def test_one_that_does_not_end(self, service: LocalService, begin: bytes) -> None:
        async with connection(service) as (reader, writer):
            writer.write(begin + b"x" * 2 * HEADER_BYTES)
            status, _, error = await answer_of(reader)
        assert (status, error["message"]) == (431, "The headers of the request are longer than 20000 bytes.")

    async def test_a_trailer_that_does_not_end(self, service: LocalService) -> None:
        """The request is with its handler, which waits for the end of the body."""
        async with connection(service) as (reader, writer):
            head = "POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}transfer-encoding: chunked\r\n\r\n0\r\nx: ".encode())
            writer.write(b"x" * 2 * HEADER_BYTES)
            status, _, error = await answer_of(reader)
        assert (status, error["message"]) == (431, "The headers of the request are longer than 20000 bytes.")

    async def test_just_not_too_many(self, service: LocalService) -> None:
        async with connection(service) as (reader, writer):
            lines = "".join(f"x-{i}: {'v' * 400}\r\n" for i in range(HEADERS - 1))
            writer.write(f"GET /health HTTP/1.1\r\nConnection: close\r\n{lines}\r\n".encode())
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")

    async def test_what_is_no_http(self, service: LocalService) -> None:
        async with connection(service) as (reader, writer):
            writer.write(b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\r\n\r\n")
            status, _, error = await answer_of(reader)
        assert (status, error["code"], error["type"]) == (400, 400, "Bad Request")

    @pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost"])
    async def test_slow_ones(
        self, service: LocalService, sent: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A connection is not kept for somebody who does not say what he wants."""
        start = http_limits.LimitedProtocol._start_timer

        def start_and_expire(protocol: http_limits.LimitedProtocol) -> None:
            start(protocol)
            timer = protocol._timer
            assert timer is not None
            protocol.loop.call_later(0.05, lambda: timer.cancelled() or timer._run())

        monkeypatch.setattr(http_limits.LimitedProtocol, "_start_timer", start_and_expire)
        async with connection(service) as (reader, writer):
            writer.write(sent)
            status, _, error = await answer_of(reader)
        assert (status, error["message"]) == (408, "The headers of a request have to come within 60 s.")


class TestConnections:
    async def test_too_many(self, service: LocalService) -> None:
        await service.http.get("/health")  # has one of them, and keeps it
        others = [
            await asyncio.open_connection("127.0.0.1", service.http.base_url.port)
            for _ in range(CONNECTIONS - 1)
        ]
        await eventually(lambda: len(service.app.state.server.server_state.connections) == CONNECTIONS)
        async with connection(service) as (reader, _):
            status, headers, error = await answer_of(reader)
        for _, writer in others:
            writer.close()
        assert (status, headers["retry-after"]) == (503, "1")
        assert error["message"] == "Too many connections; try again later."

    async def test_those_of_other_api_servers_count(self, service: LocalService) -> None:
        service.cluster.num_connections_elsewhere = CONNECTIONS
        try:
            async with connection(service) as (reader, _):
                status, _, _ = await answer_of(reader)
        finally:
            service.cluster.num_connections_elsewhere = 0
        assert status == 503

    async def test_a_client_that_does_not_read_is_waited_for_and_not_written_for(
        self, service: LocalService
    ) -> None:
        """Its answer waits in the engine client; here are about 64 KiB of it, and what the kernel takes."""
        request = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "stream": True, "n": 10}
        body = json.dumps(request).encode()
        async with connection(service) as (reader, writer):
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            head = "POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            server = service.app.state.server.server_state
            await eventually(lambda: any(c.flow.write_paused for c in server.connections))
            [stalled] = [c for c in server.connections if c.flow.write_paused]
            await asyncio.sleep(0.2)
            assert stalled.transport.get_write_buffer_size() < 256 * 1024


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Private key and certificate of this machine."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    return key, certificate


async def test_tls(vllm_config: Any, certificate: tuple[Path, Path]) -> None:  # noqa: F811
    """vLLM's flags; who does not speak TLS gets nothing."""
    flags = ["--ssl-keyfile", str(certificate[0]), "--ssl-certfile", str(certificate[1]), "--api-key", "one"]
    async with running(vllm_config, *flags) as service:
        url = str(service.http.base_url).replace("http:", "https:")
        context = ssl.create_default_context(cafile=certificate[1])
        headers = {"Authorization": "Bearer one"}
        async with httpx.AsyncClient(base_url=url, verify=context, headers=headers) as http:
            answer = await http.post("/v1/completions", json=COMPLETION)
            assert answer.json()["choices"][0]["text"] == "abc"
        async with httpx.AsyncClient(base_url=url) as stranger:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await stranger.get("/health")
        with pytest.raises(httpx.TransportError):
            await service.http.get("/health")
