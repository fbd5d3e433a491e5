"""Running requests of every kind of engine move, and their outputs are those of unmoved requests.

For each kind two real engines with a tiny random model. Every test compares with the same requests, unmoved.
"""

import gc
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from typing import Any

import pytest
import pytest_asyncio

from migration.messages import (
    AnyMigrationMessage,
    Committed,
    Confirmed,
    Final,
    Offer,
    Pull,
    Stage,
)
from pd_serve.models import resolve
from pd_serve.models.eagle import eagle_head
from pd_serve.models.kinds import KINDS, WINDOW_TOKENS
from tests.integration.instance_environment import instance_environment

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

#: Those of `make test`: a window beside full attention, a state beside full attention.
REPRESENTATIVE = ["tiny-gpt-oss", "tiny-falcon-h1"]
#: The second engine of a process has another output than the first, also where nothing moves.
NOT_TWICE = ["tiny-llama4", "tiny-granite4"]
#: Engines of `tiny` that speculate: with the model itself, and with a head whose drafts are often wrong.
DRAFTERS = {
    "tiny, a draft model": ("draft_model", lambda: resolve("tiny")),
    "tiny, EAGLE": ("eagle", eagle_head),
}
DRAFTED = 3
WINDOWED = ["tiny-mistral", "tiny-gemma3", "tiny-gpt-oss", "tiny-llama4"]
LONG = 5 * WINDOW_TOKENS + 13
_seeds = itertools.count(1)


def kinds(names: Collection[str]) -> list[Any]:
    """Parameters of tests: all kinds together would take several minutes of each run of all tests."""
    left_out = pytest.mark.skipif(not os.environ.get("PD_SERVE_ALL_KINDS"), reason="one of `make kinds`")
    not_twice = pytest.mark.skip(reason="two such engines in one process differ, unmoved")
    marks = {name: left_out for name in names if name not in REPRESENTATIVE} | dict.fromkeys(
        NOT_TWICE, not_twice
    )
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with instance_environment():
        yield


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=kinds([*KINDS, *DRAFTERS]))
async def engines(request: pytest.FixtureRequest, environment: None) -> AsyncIterator[Any]:
    """One pair of engines for all tests of a kind."""
    from tests.integration.engine_pair import EnginePair

    # Blocks of a window serve others wherever it has passed, not only at the end of the prompt.
    dense = {"prefix_cache_retention_interval": None} if request.param in WINDOWED else {}
    if request.param in DRAFTERS:
        method, model = DRAFTERS[request.param]
        drafts = {"method": method, "model": model(), "num_speculative_tokens": DRAFTED}
        pair = EnginePair("tiny", speculative_config=drafts)
    else:
        pair = EnginePair(request.param, **dense)
    await pair.start()
    yield pair
    await pair.close()
    gc.collect()


@pytest_asyncio.fixture(loop_scope="module")
async def pair(engines: Any) -> AsyncIterator[Any]:
    """The engines, which have to be at rest afterwards."""
    await engines.forget()
    yield engines
    await engines.rest()


def some_prompt(length: int) -> list[int]:
    """Another one at each call."""
    seed = next(_seeds)
    return [(seed * i * i + 3 * i + seed) % 90 + 33 for i in range(length)]


class Hold:
    """Holds the first message of this kind until `wait` returns."""

    def __init__(self, kind: type, wait: Callable[[], Awaitable[None]]) -> None:
        self.kind, self.wait, self.seen = kind, wait, False

    async def __call__(self, message: AnyMigrationMessage) -> AnyMigrationMessage:
        if isinstance(message, self.kind) and not self.seen:
            self.seen = True
            await self.wait()
        return message


def close(ours: Any, theirs: Any) -> bool:
    """Whether logprobs are equal but for the noise that a batch of another size makes."""
    (our_ids, our_values), (their_ids, their_values) = ours, theirs
    return our_ids == their_ids and our_values == pytest.approx(their_values, abs=1e-3)


@pytest.mark.parametrize("sampling", ["greedy", "seeded"])
async def test_a_request_that_moves_there_and_back_has_the_output_of_one_that_stays(
    pair: Any, sampling: str
) -> None:
    """Beside a request that decodes at its source all the time, if the batch changes no logits; it is longer
    than any window."""
    import torch

    from tests.integration import engine_rig

    speculating = pair.a.rig.engine.core.vllm_config.speculative_config is not None
    if speculating and sampling == "seeded":
        pytest.skip("what is sampled depends on the drafts")
    prompt, neighbour = some_prompt(LONG), some_prompt(40)
    params = {
        "greedy": lambda: engine_rig.greedy(120, logprobs=2),
        "seeded": lambda: engine_rig.seeded(120, presence_penalty=0.5),
    }[sampling]()
    stays = await pair.a.rig.add("stays", prompt, params)
    await pair.a.rig.finish(stays)
    await pair.forget()

    if pair.a.rig.engine.core.vllm_config.model_config.dtype == torch.float32:
        await pair.add(pair.a, "neighbour", neighbour, engine_rig.greedy(1500))
    moves = await pair.add(pair.a, "moves", prompt, params)
    await pair.tokens("moves", 10)
    await pair.move("moves", pair.a, pair.b)
    await pair.tokens("moves", len(moves.tokens) + 15)
    await pair.move("moves", pair.b, pair.a)
    await pair.a.rig.finish(moves)
    await pair.abort("neighbour")

    assert set(moves.epochs) == {0, 1, 2}
    assert moves.tokens == stays.tokens
    assert len(moves.logprobs) == len(stays.logprobs)
    assert all(map(close, moves.logprobs, stays.logprobs))


async def test_each_group_has_to_be_copied(pair: Any) -> None:
    """Left out of the copy, it changes the output: so the other tests show that it is copied."""
    from vllm.v1.kv_cache_interface import MambaSpec

    from tests.integration.engine_pair import left_out
    from tests.integration.engine_rig import greedy, seeded

    speculating = pair.a.rig.engine.core.vllm_config.speculative_config is not None
    sampled = greedy if speculating else seeded
    groups = pair.a.rig.engine.core.scheduler.kv_cache_config.kv_cache_groups
    states = [index for index, group in enumerate(groups) if isinstance(group.kv_cache_spec, MambaSpec)]
    prompt = some_prompt(3 * WINDOW_TOKENS)
    stays = await pair.a.rig.generate("stays", prompt, sampled(80))
    for group in range(len(groups)):
        await pair.forget()
        state = states.index(group) if group in states else None

        async def on_way(message: AnyMigrationMessage, group=group, state=state) -> AnyMigrationMessage:
            return left_out(message, group, state)

        pair.on_way = on_way
        moves = await pair.add(pair.a, f"without {group}", prompt, sampled(80))
        await pair.tokens(f"without {group}", 10)
        await pair.move(f"without {group}", pair.a, pair.b)
        await pair.b.rig.finish(moves)
        first = moves.epochs.index(1)
        assert moves.tokens[:first] == stays[:first]
        assert moves.tokens[first : first + 20] != stays[first : first + 20], group


async def test_a_hand_off_begins_while_the_prompt_is_computed(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    from tests.integration.engine_rig import greedy

    prompt = some_prompt(1200)
    stays = await pair.a.rig.generate("stays", prompt, greedy(60))
    await pair.forget()

    core = pair.a.rig.engine.core
    step = core.step_fn

    def slow_step() -> Any:
        time.sleep(0.05)
        return step()

    offers, parts, records = [], [], []

    async def on_way(message: AnyMigrationMessage) -> AnyMigrationMessage:
        if isinstance(message, Offer):
            offers.append(message.request)
        if isinstance(message, Stage):
            parts.append(message.part.end)
        return message

    def hand_off(started: list[Any]) -> None:
        for request in started:
            records.append(pair.start_move(request.request_id, pair.a, pair.b, request))

    pair.on_way = on_way
    monkeypatch.setattr(pair.a.rig, "on_prefill_started", hand_off)
    monkeypatch.setattr(core, "step_fn", slow_step)
    moves = await pair.add(pair.a, "moves", prompt, greedy(60), handoff=True)
    await pair.tokens("moves", 2)
    monkeypatch.setattr(core, "step_fn", step)
    await pair.b.rig.finish(moves)
    (record,) = records
    assert (await record).committed
    assert moves.tokens == stays
    if core.vllm_config.scheduler_config.enable_chunked_prefill:
        (offer,) = offers
        assert offer.output_token_ids == []
        has_stages = any(manager.block_size < 1200 for manager in pair.append_only(pair.a))
        assert not has_stages or parts[0] < 1200


@pytest.mark.parametrize("engines", kinds(WINDOWED), indirect=True)
async def test_a_window_passes_while_its_blocks_are_copied(pair: Any) -> None:
    """What has left the window is neither needed nor shared at the destination."""
    from tests.integration.engine_rig import greedy

    prompt = some_prompt(LONG)
    outputs = []
    for moved in (False, True):
        await pair.forget()
        request = await pair.add(pair.a, f"first {moved}", prompt, greedy(250))
        await pair.tokens(f"first {moved}", 5)
        here = pair.a
        if moved:
            pair.on_way = Hold(Stage, lambda: pair.tokens("first True", 3 * WINDOW_TOKENS))
            record = await pair.move("first True", pair.a, pair.b)
            assert record.stages > 2
            here = pair.b
        await here.rig.finish(request)
        again = await here.rig.add(f"again {moved}", prompt + request.tokens, greedy(40))
        await here.rig.finish(again)
        assert again.cached_tokens > len(prompt) + WINDOW_TOKENS
        outputs.append((request.tokens, again.tokens))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("engines", ["tiny-qwen3-next"], indirect=True)
async def test_a_state_crosses_into_its_next_block_while_the_request_moves(pair: Any) -> None:
    """With a prefix cache there is a state for each block, and the request goes on in the next one."""
    from tests.integration.engine_rig import greedy

    (block,) = {manager.block_size for manager in pair.append_only(pair.a)}
    prompt = some_prompt(block - 10)
    outputs = []
    for moved in (False, True):
        await pair.forget()
        request = await pair.add(pair.a, f"first {moved}", prompt, greedy(150))
        await pair.tokens(f"first {moved}", 2)
        here = pair.a
        if moved:
            pair.on_way = Hold(Pull, lambda: pair.tokens("first True", 30))
            await pair.move("first True", pair.a, pair.b)
            assert 30 < request.epochs.count(0) < 150
            here = pair.b
        await here.rig.finish(request)
        follow_up = prompt + request.tokens
        again = await here.rig.add(f"again {moved}", follow_up, greedy(30))
        await here.rig.finish(again)
        outputs.append((request.tokens, again.tokens))
    assert outputs[0] == outputs[1]


class Drafts:
    """Counts what an engine has drafted, and what of it was accepted."""

    def __init__(self, member: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = self.accepted = 0
        scheduler = member.rig.engine.core.scheduler
        count = scheduler.make_spec_decoding_stats

        def counted(*args: Any, num_draft_tokens: int, num_accepted_tokens: int, **more: Any) -> Any:
            self.made += num_draft_tokens
            self.accepted += num_accepted_tokens
            more |= {"num_draft_tokens": num_draft_tokens, "num_accepted_tokens": num_accepted_tokens}
            return count(*args, **more)

        monkeypatch.setattr(scheduler, "make_spec_decoding_stats", counted)

    @property
    def share(self) -> float:
        return self.accepted / self.made


@pytest.mark.parametrize("engines", kinds(DRAFTERS), indirect=True)
async def test_as_many_drafts_are_accepted_after_a_move(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drafter's KV moves with the model's; without it, drafts are wrong, and the output is the same."""
    from tests.integration.engine_pair import unchanged
    from tests.integration.engine_rig import greedy

    prompt = [(i * i + 3 * i + 1) % 90 + 33 for i in range(LONG)]
    here = Drafts(pair.a, monkeypatch)
    stays = await pair.a.rig.generate("stays", prompt, greedy(300))

    core = pair.b.rig.engine.core
    (group,) = core.scheduler.kv_cache_config.kv_cache_groups
    drafters = group.layer_names[
        len(group.layer_names) // 2 :
    ]  # as many layers as the model has, behind them
    layers = core.vllm_config.compilation_config.static_forward_context

    async def spoil(message: AnyMigrationMessage) -> AnyMigrationMessage:
        if isinstance(message, Final):  # all blocks but those of the tail are there
            for layer in drafters:
                layers[layer].kv_cache.fill_(12.0)
        return message

    shares = []
    for name in ("moves", "loses"):
        await pair.forget()
        pair.on_way = spoil if name == "loses" else unchanged
        there = Drafts(pair.b, monkeypatch)
        request = await pair.add(pair.a, name, prompt, greedy(300))
        await pair.tokens(name, 10)
        await pair.move(name, pair.a, pair.b)
        await pair.b.rig.finish(request)
        assert request.tokens == stays
        shares.append(there.share)
    moves, loses = shares
    assert loses < here.share / 2
    assert moves == pytest.approx(here.share, abs=0.1)


@pytest.mark.parametrize("stage", [Offer, Pull, Stage, Final, Committed, Confirmed])
async def test_an_abort_in_any_stage_leaves_nothing_behind(pair: Any, stage: type) -> None:
    from tests.integration.engine_rig import greedy

    prompt = some_prompt(LONG)
    request = await pair.add(pair.a, "r", prompt, greedy(1000))
    await pair.tokens("r", 3)
    hold = pair.on_way = Hold(stage, lambda: pair.abort("r"))
    record = await pair.start_move("r", pair.a, pair.b)
    assert hold.seen or (stage is Stage and pair.a.rig.engine.scheduler.cache_groups.stage_tokens > LONG)
    assert record.committed == (stage is Confirmed or not hold.seen)
    await pair.abort("r")
    assert not request.ended
