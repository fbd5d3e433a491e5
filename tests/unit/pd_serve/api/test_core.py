"""What dispatch learns of a request from its headers."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.datastructures import Headers
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from pd_serve.api import identity
from pd_serve.api.codec import VllmCodec
from pd_serve.api.core import ClusterCore
from pd_serve.frontend.frontend import Frontend
from router.request import NewRequest


async def dispatched(headers: dict[str, str], account: int = 0) -> NewRequest:
    seen: list[NewRequest] = []

    async def submit(request_id: str, payload: Any, new: NewRequest, **details: Any) -> bool:
        seen.append(new)
        return False

    frontend = SimpleNamespace(adoption=SimpleNamespace(submit=submit), instances=SimpleNamespace(slots=[0]))
    core = ClusterCore(
        cast(Frontend, frontend), asyncio.Queue(), VllmCodec(), ("generate",), account=lambda: account
    )
    token = identity._headers.set(Headers(headers))
    try:
        await core.add_request_async(
            EngineCoreRequest("r", [1, 2, 3], None, SamplingParams(), None, 0.0, None, None, None)
        )
    finally:
        identity._headers.reset(token)
    return seen[0]


@pytest.mark.parametrize("headers", [{}, {"X-Session-ID": ""}, {"X-Session-ID": "x" * 257}])
async def test_a_request_without_a_short_name_of_its_session_has_none(headers: dict[str, str]) -> None:
    assert (await dispatched(headers)).session == ""


async def test_a_session_belongs_to_the_key_of_its_requests() -> None:
    headers = {"x-session-id": "chat"}
    ours, again, theirs = [(await dispatched(headers, account)).session for account in (1, 1, 2)]

    assert ours == again != ""
    assert theirs not in ("", ours)
