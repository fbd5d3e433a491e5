"""Requests of every kind survive the death of their instance, on engines of every kind, and move."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migration.messages import RequestId
from pd_serve.models import resolve
from pd_serve.platform.environment import engine_environment

pytestmark = [
    pytest.mark.integration,
    # numba, of vLLM's search for drafts.
    pytest.mark.filterwarnings("ignore:(?s).*reflected list"),
    pytest.mark.filterwarnings("ignore:max_rollback_tokens is deprecated"),  # xgrammar
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]

NUM_TOKENS = 60


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """What every instance's process is started with; set before the engine module imports vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in engine_environment(1, resolve("tiny")).items():
            patch.setenv(name, value)
        patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
        yield
    import vllm.envs

    vllm.envs.disable_envs_cache()  # an engine freezes what it has read
    gc.collect()


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


async def lose_and_continue(variant: Any, lost_at: int) -> None:
    """A request's instance dies in the middle of its output; another one continues it with equal tokens."""
    from tests.integration.engine_rig import CLIENT, EngineRig, Stream, eventually, payload

    request = payload("r", variant.prompt, variant.params(NUM_TOKENS), **variant.fields)
    first = EngineRig(**variant.arguments)
    await first.engine.start()
    try:
        alone = first.streams["r"] = Stream()
        await first.engine.add(request, CLIENT)
        expected = await first.finish(alone)
        assert len(expected) == NUM_TOKENS
        assert len(set(expected)) > 5, "nothing would show"
        lost = first.streams["r"] = Stream()
        await first.engine.add(request, CLIENT)
        await eventually(lambda: len(lost.tokens) >= lost_at)
    finally:
        await first.close()
    delivered = lost.tokens[:lost_at]
    assert delivered == expected[:lost_at]

    second = EngineRig(**variant.arguments)
    await second.engine.start()
    try:
        stream = second.streams["r"] = Stream(list(delivered), [0] * lost_at)
        assert await second.engine.add(request, CLIENT, epoch=1000, output_token_ids=delivered)
        assert await second.finish(stream) == expected
        assert set(stream.epochs[lost_at:]) == {1000}
        assert await second.engine.live_requests() == []
        assert not second.deaths
    finally:
        await second.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_lost_request_is_continued_elsewhere_with_the_same_tokens(kind: str, tmp_path: Path) -> None:
    from tests.integration.engine_variants import VARIANTS

    await lose_and_continue(VARIANTS[kind](tmp_path), lost_at=22)


@pytest.mark.parametrize("kind", ["prompt_embeddings", "some_embeddings", "thinking_budget", "structured"])
async def test_a_request_that_leaves_and_returns_has_the_same_tokens(kind: str, tmp_path: Path) -> None:
    """Also if it is preempted where it has come to, and computed anew from its prompt."""
    from tests.integration.engine_rig import CLIENT, EngineRig, Stream, eventually, payload
    from tests.integration.engine_variants import VARIANTS

    variant = VARIANTS[kind](tmp_path)
    request = payload("r", variant.prompt, variant.params(NUM_TOKENS), **variant.fields)
    rig = EngineRig(**variant.arguments)
    await rig.engine.start()
    try:
        alone = rig.streams["r"] = Stream()
        await rig.engine.add(request, CLIENT)
        expected = await rig.finish(alone)
        stream = rig.streams["r"] = Stream()
        await rig.engine.add(request, CLIENT)
        for number, at in enumerate((1, 15)):
            wanted = max(at, len(stream.tokens) + 1)
            await eventually(lambda n=wanted: len(stream.tokens) >= n)
            await rig.come_back(await rig.leave("r"), f"m{number}")
        await eventually(lambda: stream.epochs[-1] == 2)  # it runs
        assert await rig.engine.utility("reset_prefix_cache", True, False)
        assert await rig.finish(stream) == expected
        assert sorted(set(stream.epochs)) == [0, 1, 2]
        assert not rig.deaths
    finally:
        await rig.close()


async def test_a_thinking_budget_ends_the_thinking_elsewhere(tmp_path: Path) -> None:
    """A request without a budget thinks on."""
    from tests.integration.engine_rig import EngineRig, greedy
    from tests.integration.engine_variants import END, VARIANTS

    variant = VARIANTS["thinking_budget"](tmp_path)
    rig = EngineRig(**variant.arguments)
    await rig.engine.start()
    try:
        assert variant.prompt is not None
        with_budget = await rig.generate("budget", variant.prompt, variant.params(NUM_TOKENS))
        without = await rig.generate("none", variant.prompt, greedy(NUM_TOKENS))
        assert END in with_budget[22:], "it ends behind the place where other tests take the request away"
        assert END not in without
    finally:
        await rig.close()


async def test_it_is_continued_by_vllms_own_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a release that lacks what moving a request relies on."""
    from migration.vllm_engine import compatibility
    from tests.integration.engine_variants import VARIANTS

    name = "vllm.v1.core.sched.scheduler:Scheduler.gone_in_the_next_release"
    monkeypatch.setattr(compatibility, "RELIED_ON", compatibility.RELIED_ON | {name: ()})
    await lose_and_continue(VARIANTS["logprobs"](tmp_path), lost_at=22)


async def test_a_release_that_cannot_continue_requests_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for it gets the reason; the engine serves on."""
    from migration.vllm_engine import compatibility
    from pd_serve.errors import DestinationRefusedError
    from tests.integration.engine_rig import CLIENT, EngineRig, greedy, payload
    from tests.integration.engine_variants import PROMPT

    name = "vllm.v1.request:Request.gone_in_the_next_release"
    needed = compatibility.RELIED_ON_TO_CONTINUE | {name: ()}
    monkeypatch.setattr(compatibility, "RELIED_ON_TO_CONTINUE", needed)
    rig = EngineRig()
    await rig.engine.start()
    try:
        with pytest.raises(DestinationRefusedError, match=f"cannot be continued: .* lacks {name}"):
            await rig.engine.add(payload("r", PROMPT, greedy(9)), CLIENT, output_token_ids=[1, 2])
        assert await rig.engine.live_requests() == []
        assert len(await rig.generate(RequestId("next"), PROMPT, greedy(9))) == 9
    finally:
        await rig.close()
