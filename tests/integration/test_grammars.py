"""Structured outputs on a real engine: what cannot be followed, and several backends in one batch."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from migration.errors import DestinationRefusedError
from tests.integration.instance_environment import instance_environment

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:max_rollback_tokens is deprecated"),  # xgrammar
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]

PROMPT = [20, 27, 34]


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with instance_environment():
        yield


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def rig(environment: None) -> AsyncIterator[Any]:
    from tests.integration.engine_rig import running_rig

    async with running_rig() as rig:
        yield rig


@pytest.mark.parametrize(
    ("constraint", "why"),
    [
        ({"regex": "("}, "followed: "),
        ({"grammar": "root ::= root"}, "followed: it allows neither a token nor the end"),
        ({"grammar": 'root ::= "aaa" b\nb ::= b'}, "at output token 4: it allows neither"),
        ({"backend": "guidance", "grammar": "start: start"}, "NoExtension"),
        ({"backend": "outlines", "regex": "("}, "Failed to build DFA"),
        ({"backend": "guidance", "grammar": 'start: "aaa" start'}, "at output token 1: parser error"),
    ],
)
async def test_a_structured_output_that_cannot_be_followed_ends_with_the_reason(
    rig: Any, constraint: dict[str, str], why: str
) -> None:
    """Also that of a request which is continued after the death of another instance."""
    from tests.integration.engine_rig import CLIENT, eventually, greedy, payload
    from tests.integration.engine_variants import following

    parameters = greedy(10, structured_outputs=following(**constraint))
    stream = await rig.add("refused", PROMPT, parameters)
    await eventually(lambda: stream.ended)
    assert str(stream.stop_reason).startswith("The structured output cannot be followed: ")
    assert why in str(stream.stop_reason)
    lost = payload("lost", PROMPT, parameters)
    with pytest.raises(DestinationRefusedError, match=r"cannot be followed|does not accept the tokens"):
        await rig.engine.add(lost, CLIENT, output_token_ids=[1, 2])
    assert await rig.engine.live_requests() == []


async def test_every_structured_output_is_followed_with_its_own_backend(rig: Any) -> None:
    """Also in one batch. xgrammar ignores `multipleOf`."""
    from tests.integration.engine_rig import seeded
    from tests.integration.engine_variants import following

    number = {"type": "integer", "multipleOf": 1000, "minimum": 1000, "maximum": 1999}
    backends = {
        "xgrammar": {"regex": "[0-9]{4}"},
        "guidance": {"json": number},
        "outlines": {"regex": "[a-c]{4}"},
    }
    streams = {
        backend: await rig.add(
            backend, PROMPT, seeded(4, structured_outputs=following(backend, **constraint))
        )
        for backend, constraint in backends.items()
    }
    followed = {backend: bytes(await rig.finish(stream)) for backend, stream in streams.items()}
    assert followed["guidance"] == b"1000"
    assert followed["xgrammar"].isdigit()
    assert set(followed["outlines"]) <= set(b"abc")


async def test_a_request_without_structured_output_has_no_refusal() -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    from migration.vllm_engine.grammars import refusal

    assert refusal(Request("r", PROMPT, SamplingParams(max_tokens=5), None)) is None
