"""Requests of every kind survive the death of their instance, on engines of every kind, and move."""

import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from migration.messages import RequestId
from tests.integration.instance_environment import instance_environment

pytestmark = [
    pytest.mark.integration,
    pytest.mark.asyncio(loop_scope="module"),
    # numba, of vLLM's search for drafts.
    pytest.mark.filterwarnings("ignore:(?s).*reflected list"),
    pytest.mark.filterwarnings("ignore:max_rollback_tokens is deprecated"),  # xgrammar
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]

NUM_TOKENS = 60


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with instance_environment():
        yield


KINDS = (
    "sliding_window",
    "ngram",
    "lora",
    "prompt_embeddings",
    "some_embeddings",
    "thinking_budget",
    "structured",
    "logprobs",
)


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=KINDS)
async def served(
    request: pytest.FixtureRequest, environment: None, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Any]:
    """A request, an engine that serves it, and its output there."""
    from tests.integration.engine_rig import running_rig
    from tests.integration.engine_variants import VARIANTS

    variant = VARIANTS[request.param](tmp_path_factory.mktemp(request.param))
    async with running_rig(**variant.arguments) as rig:
        yield variant, rig, await undisturbed(variant, rig)


async def undisturbed(variant: Any, rig: Any) -> list[int]:
    stream = await add(variant, rig)
    expected: list[int] = await rig.finish(stream)
    assert len(expected) == NUM_TOKENS
    assert len(set(expected)) > 5, "nothing would show"
    return expected


async def add(variant: Any, rig: Any) -> Any:
    from tests.integration.engine_rig import CLIENT, Stream, payload

    stream = rig.streams["r"] = Stream()
    request = payload("r", variant.prompt, variant.params(NUM_TOKENS), **variant.fields)
    await rig.engine.add(request, CLIENT)
    return stream


async def lose_and_continue(variant: Any, rig: Any, expected: list[int], lost_at: int) -> None:
    """A request is lost in the middle of its output. An engine that knows nothing of it continues it."""
    from tests.integration.engine_rig import CLIENT, Stream, eventually, payload

    lost = await add(variant, rig)
    await eventually(lambda: len(lost.tokens) >= lost_at)
    await rig.engine.abort([RequestId("r")])
    delivered = lost.tokens[:lost_at]
    assert delivered == expected[:lost_at]
    stream = rig.streams["r"] = Stream(list(delivered), [0] * lost_at)
    request = payload("r", variant.prompt, variant.params(NUM_TOKENS), **variant.fields)
    assert await rig.engine.add(request, CLIENT, epoch=1000, output_token_ids=delivered)
    assert await rig.finish(stream) == expected
    assert set(stream.epochs[lost_at:]) == {1000}
    assert await rig.engine.live_requests() == []


async def test_a_lost_request_is_continued_with_the_same_tokens(served: Any) -> None:
    await lose_and_continue(*served, lost_at=22)


@pytest.mark.parametrize(
    "served", ["prompt_embeddings", "some_embeddings", "thinking_budget", "structured"], indirect=True
)
async def test_a_request_that_leaves_and_returns_has_the_same_tokens(served: Any) -> None:
    """Also if it is preempted where it has come to, and computed anew from its prompt."""
    from tests.integration.engine_rig import eventually

    variant, rig, expected = served
    stream = await add(variant, rig)
    for number, at in enumerate((1, 15)):
        wanted = max(at, len(stream.tokens) + 1)
        await eventually(lambda n=wanted: len(stream.tokens) >= n)
        await rig.come_back(await rig.leave("r"), f"m{number}")
    await eventually(lambda: stream.epochs[-1] == 2)  # it runs
    assert await rig.engine.utility("reset_prefix_cache", True, False)
    assert await rig.finish(stream) == expected
    assert sorted(set(stream.epochs)) == [0, 1, 2]


@pytest.mark.parametrize("served", ["ngram"], indirect=True)
async def test_a_greedy_request_has_the_same_tokens_beside_a_sampled_one(served: Any) -> None:
    from tests.integration.engine_rig import seeded

    variant, rig, expected = served
    sampled = await rig.add("sampled", variant.prompt, seeded(NUM_TOKENS))
    assert await rig.finish(await add(variant, rig)) == expected
    assert len(await rig.finish(sampled)) == NUM_TOKENS


@pytest.mark.parametrize("served", ["structured"], indirect=True)
async def test_the_batch_goes_on_while_a_grammar_takes_the_tokens_of_another_instance(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.integration.engine_rig import CLIENT, Stream, greedy, payload

    variant, rig, expected = served
    other = await rig.add("other", variant.prompt, greedy(1500))
    manager, replayed = rig.engine.core.structured_output_manager, threading.Event()
    accept = manager.accept_tokens

    def accept_slowly(request: Any, token_ids: list[int]) -> Any:
        if request.use_structured_output and not replayed.is_set():
            before, bound = len(other.tokens), time.monotonic() + 30
            while len(other.tokens) < before + 3:
                assert time.monotonic() < bound, "the batch stands still"
                time.sleep(0.001)
            replayed.set()
        return accept(request, token_ids)

    monkeypatch.setattr(manager, "accept_tokens", accept_slowly)
    delivered = expected[:10]
    stream = rig.streams["r"] = Stream(list(delivered), [0] * len(delivered))
    request = payload("r", variant.prompt, variant.params(NUM_TOKENS), **variant.fields)
    assert await rig.engine.add(request, CLIENT, epoch=1000, output_token_ids=delivered)
    assert await rig.finish(stream) == expected
    assert replayed.is_set()
    await rig.engine.abort([RequestId("other")])


@pytest.mark.parametrize("served", ["thinking_budget"], indirect=True)
async def test_a_thinking_budget_ends_the_thinking(served: Any) -> None:
    """A request without a budget thinks on."""
    from tests.integration.engine_rig import greedy
    from tests.integration.engine_variants import END

    variant, rig, with_budget = served
    without = await rig.generate("none", variant.prompt, greedy(NUM_TOKENS))
    assert END in with_budget[22:], "it ends behind the place where other tests take the request away"
    assert END not in without


async def test_it_is_continued_by_vllms_own_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a release that lacks what moving a request relies on."""
    from migration.vllm_engine import compatibility
    from tests.integration.engine_rig import running_rig
    from tests.integration.engine_variants import VARIANTS

    name = "vllm.v1.core.sched.scheduler:Scheduler.gone_in_the_next_release"
    monkeypatch.setattr(compatibility, "RELIED_ON", compatibility.RELIED_ON | {name: ()})
    variant = VARIANTS["logprobs"](tmp_path)
    async with running_rig(**variant.arguments) as rig:
        await lose_and_continue(variant, rig, await undisturbed(variant, rig), lost_at=22)


async def test_a_release_that_cannot_continue_requests_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for it gets the reason; the engine serves on."""
    from migration.vllm_engine import compatibility
    from pd_serve.errors import DestinationRefusedError
    from tests.integration.engine_rig import CLIENT, greedy, payload, running_rig
    from tests.integration.engine_variants import PROMPT

    name = "vllm.v1.request:Request.gone_in_the_next_release"
    needed = compatibility.RELIED_ON_TO_CONTINUE | {name: ()}
    monkeypatch.setattr(compatibility, "RELIED_ON_TO_CONTINUE", needed)
    async with running_rig() as rig:
        with pytest.raises(DestinationRefusedError, match=f"cannot be continued: .* lacks {name}"):
            await rig.engine.add(payload("r", PROMPT, greedy(9)), CLIENT, output_token_ids=[1, 2])
        assert await rig.engine.live_requests() == []
        assert len(await rig.generate(RequestId("next"), PROMPT, greedy(9))) == 9
