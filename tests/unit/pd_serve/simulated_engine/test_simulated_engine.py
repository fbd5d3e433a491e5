"""The simulated engine alone: batching, preemption, prefix cache, and tokens that follow from all blocks."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migration.engine_interface import EngineEvents
from migration.messages import FinalState, MigrationId, RequestId
from migration.token_span import TokenSpan
from pd_serve.errors import DestinationRefusedError, InvalidRequestError, SourceGoneError
from pd_serve.simulated_engine.contents import expected_output
from pd_serve.simulated_engine.cost_model import LinearCostModel
from pd_serve.simulated_engine.outputs import SimulatedOutput, SimulatedPayload, decode_payload
from pd_serve.simulated_engine.settings import EngineSettings
from pd_serve.simulated_engine.simulated_engine import SimulatedEngine
from pd_serve.simulation.virtual_time import VirtualLoop
from router.load import EngineLoad
from tests.virtual_time import in_virtual_time

MODEL = LinearCostModel((5.0, 1.0, 0.0), (10.0, 1.0, 0.0))
BLOCK_TOKENS = 4


def settings(**changes: object) -> EngineSettings:
    base: dict[str, object] = {"num_blocks": 32, "block_tokens": BLOCK_TOKENS, "watermark": 0.0}
    return EngineSettings(MODEL, **(base | changes))  # type: ignore[arg-type]


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - an engine offers nothing to wait on
        await asyncio.sleep(0.0001)


class Rig:
    """An engine and what it has said."""

    def __init__(self, **changes: object) -> None:
        self.settings = settings(**changes)
        self.said: dict[str, list[int]] = {}
        self.order: list[str] = []
        self.started: list[str] = []
        self.ended: list[str] = []
        self.loads: list[EngineLoad] = []
        events = EngineEvents(
            on_prefill_started=self.started.extend,
            on_requests_ended=self.ended.extend,
            on_load=self.loads.append,
            on_death=lambda error: None,
        )
        self.engine = SimulatedEngine(self.settings, decode_payload, self._hear, events)
        self._payloads: dict[str, SimulatedPayload] = {}

    def _hear(self, client: str, outputs: list[SimulatedOutput], spans: list[TokenSpan]) -> None:
        for output, (_, index, _) in zip(outputs, spans, strict=True):
            assert index == len(self.said.setdefault(output.request_id, []))
            if not index:
                self.order.append(output.request_id)
            self.said[output.request_id] += output.new_token_ids

    async def add(
        self,
        request_id: str,
        prompt_tokens: int,
        max_tokens: int,
        *,
        priority: int = 0,
        segments: tuple[int, ...] = (),
        seed: int | None = None,
        output: list[int] | None = None,
    ) -> None:
        payload = SimulatedPayload(
            request_id,
            prompt_tokens,
            max_tokens,
            priority,
            len(self._payloads),
            segments,
            len(self._payloads) if seed is None else seed,
        )
        self._payloads[request_id] = payload
        await self.engine.add(payload.encode(), "client", output_token_ids=output)

    def expected(self, request_id: str) -> list[int]:
        payload = self._payloads[request_id]
        return expected_output(payload.prompt, payload.max_tokens, BLOCK_TOKENS)

    async def until_idle(self) -> None:
        await until(lambda: len(self.ended) >= len(self._payloads))
        await asyncio.sleep(0.01)
        assert await self.engine.check_integrity() == []
        assert self.engine.batcher.pool.num_free == self.settings.num_blocks


@in_virtual_time
async def test_the_output_follows_from_the_prompt() -> None:
    rig = Rig()
    await rig.add("r", 10, 9)

    await rig.until_idle()

    assert rig.said["r"] == rig.expected("r")


@in_virtual_time
async def test_steps_take_what_the_cost_model_says() -> None:
    rig = Rig()
    began = asyncio.get_running_loop().time()
    await rig.add("r", 10, 3)

    await until(lambda: rig.engine.steps >= 3)

    # A prompt of 10 tokens, then two steps of one request.
    assert asyncio.get_running_loop().time() - began == pytest.approx(0.015 + 2 * 0.011, abs=0.0003)


@in_virtual_time
@pytest.mark.parametrize("when", ["while it decodes", "in its last block"])
async def test_a_changed_block_changes_the_output(when: str) -> None:
    rig = Rig()
    await rig.add("r", 10, 12)
    await until(lambda: len(rig.said.get("r", ())) >= (2 if when == "while it decodes" else 11))
    [sequence] = rig.engine.batcher.running

    rig.engine.batcher.pool.content[sequence.blocks[0]] += 1
    await rig.until_idle()

    assert len(rig.said["r"]) == 12
    assert rig.said["r"] != rig.expected("r")


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(-1, 1)), min_size=1, max_size=12),
    st.sampled_from([None, 6, 16]),
    st.booleans(),
    st.integers(24, 40),
)
def test_the_output_does_not_depend_on_preemption_caching_or_chunks(
    requests: list[tuple[int, int, int]], chunk_tokens: int | None, prefix_caching: bool, num_blocks: int
) -> None:
    """Requests that share their beginnings, in blocks that do not suffice for all of them."""

    async def run() -> None:
        rig = Rig(num_blocks=num_blocks, chunk_tokens=chunk_tokens, prefix_caching=prefix_caching)
        for number, (prompt_tokens, max_tokens, priority) in enumerate(requests):
            await rig.add(str(number), prompt_tokens, max_tokens, priority=priority, seed=number % 2)
            await asyncio.sleep(0.02 * (number % 3))
        await rig.until_idle()
        for number in range(len(requests)):
            assert rig.said[str(number)] == rig.expected(str(number))

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(run())


@in_virtual_time
async def test_the_latest_of_the_lowest_priority_is_preempted_and_comes_back_first() -> None:
    rig = Rig(num_blocks=12)
    await rig.add("normal", 12, 20)
    await rig.add("high", 12, 20, priority=-1)
    await rig.add("late", 12, 20)

    await rig.until_idle()

    assert rig.engine.batcher.preemptions > 0
    assert rig.engine.batcher.preemption_loss_s > 0
    assert rig.ended[0] == "high"
    assert all(rig.said[name] == rig.expected(name) for name in rig.said)


@in_virtual_time
async def test_high_priority_overtakes_in_the_queue() -> None:
    rig = Rig(num_blocks=10)
    await rig.add("first", 24, 8)
    await rig.add("normal", 24, 4)
    await rig.add("high", 24, 4, priority=-1)

    await rig.until_idle()

    assert rig.order == ["first", "high", "normal"]


@in_virtual_time
async def test_a_known_beginning_is_not_computed_again() -> None:
    rig = Rig(prefix_caching=True)
    await rig.add("one", 20, 2, segments=(5,))
    await rig.until_idle()
    busy = rig.engine.busy_s

    await rig.add("two", 20, 2, segments=(5,))
    await rig.until_idle()

    # 16 of 20 tokens are in whole blocks that leave a token to compute.
    assert rig.engine.busy_s - busy == pytest.approx(0.005 + 0.004 + 0.011)
    assert rig.said["two"] == rig.said["one"] == rig.expected("two")


@in_virtual_time
async def test_prompts_go_first_without_chunks_and_beside_decodes_with_them() -> None:
    whole, chunked = Rig(num_blocks=100), Rig(num_blocks=100, chunk_tokens=8)

    async def tokens_meanwhile(rig: Rig) -> int:
        await rig.add("old", 4, 20)
        await until(lambda: rig.said)
        before = len(rig.said["old"])
        await rig.add("new", 64, 2)
        await until(lambda: "new" in rig.said)
        return len(rig.said["old"]) - before

    # The step under way when it came; the chunks of 7 leave room for the old one in each of ten more.
    assert await tokens_meanwhile(whole) == 1
    assert await tokens_meanwhile(chunked) == 11


@in_virtual_time
async def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    rig = Rig(num_blocks=4)

    with pytest.raises(InvalidRequestError, match="do not fit"):
        await rig.add("r", 10, 7)


@in_virtual_time
async def test_it_continues_a_request_from_known_tokens() -> None:
    rig = Rig()
    await rig.add("whole", 10, 9, seed=3)
    await rig.until_idle()
    rig.said["rest"] = rig.said["whole"][:4]

    await rig.add("rest", 10, 9, seed=3, output=rig.said["whole"][:4])
    await rig.until_idle()

    assert rig.said["rest"] == rig.said["whole"]


@in_virtual_time
@pytest.mark.parametrize("known", range(1, 9))
async def test_it_continues_from_known_tokens_wherever_a_chunk_ends(known: int) -> None:
    """A chunk may end one token early, so that the last token is computed as a decode."""
    rig = Rig(chunk_tokens=5)
    await rig.add("whole", 10, 9, seed=3)
    await rig.until_idle()
    rig.said["rest"] = rig.said["whole"][:known]

    await rig.add("rest", 10, 9, seed=3, output=rig.said["whole"][:known])
    await rig.until_idle()

    assert rig.said["rest"] == rig.said["whole"]


@given(
    prompt_tokens=st.integers(1, 14),
    max_tokens=st.integers(2, 8),
    known=st.integers(1, 7),
    chunk_tokens=st.integers(1, 24),
    prefix_caching=st.booleans(),
    beside=st.integers(0, 2),
)
def test_a_recomputed_request_continues_whatever_the_chunks(
    prompt_tokens: int, max_tokens: int, known: int, chunk_tokens: int, prefix_caching: bool, beside: int
) -> None:
    """All boundaries of chunks, blocks and of what is known; others beside it move the boundaries."""
    known = min(known, max_tokens - 1)

    @in_virtual_time
    async def run() -> None:
        rig = Rig(num_blocks=64, chunk_tokens=chunk_tokens, prefix_caching=prefix_caching)
        for number in range(beside):
            await rig.add(f"beside-{number}", 3 + number, 12)
        await rig.add("whole", prompt_tokens, max_tokens, seed=7)
        whole = rig.expected("whole")
        rig.said["rest"] = whole[:known]
        await rig.add("rest", prompt_tokens, max_tokens, seed=7, output=whole[:known])
        await rig.until_idle()
        assert rig.said["rest"] == rig.said["whole"] == whole

    run()


@in_virtual_time
async def test_an_aborted_request_frees_its_blocks_wherever_it_is() -> None:
    rig = Rig(num_blocks=10)
    for name in ("running", "waiting"):
        await rig.add(name, 24, 8)
    await asyncio.sleep(0.06)

    assert await rig.engine.abort([RequestId("running"), RequestId("waiting"), RequestId("none")]) == ["none"]
    await rig.until_idle()


@in_virtual_time
async def test_the_load_counts_what_waits() -> None:
    rig = Rig(num_blocks=10)
    await rig.add("running", 24, 8, priority=-1)
    await asyncio.sleep(0.001)
    await rig.add("first", 20, 8)
    await rig.add("second", 9, 8)
    await asyncio.sleep(0.05)
    load = rig.engine.load()

    assert (load.running, load.waiting, load.waiting_tokens) == (1, 2, 29)
    assert (load.head_of_line_blocks, load.waiting_blocks) == (5, 8)
    assert (load.total_blocks, load.free_blocks, load.high_priority) == (10, 2, 1)
    assert rig.loads[-1].waiting == 2
    await rig.until_idle()
    assert rig.loads[-1].waiting_blocks == rig.loads[-1].waiting_tokens == 0


# ---- as a source and as a destination


async def move(
    source: Rig, destination: Rig, request_id: str, copy: Callable[[list[int], list[int]], None]
) -> None:
    """A migration by hand: everything in one stage, then the tail."""
    described = await source.engine.describe(RequestId(request_id))
    reserved = await destination.engine.reserve(MigrationId("m"), described)
    final = await source.engine.next_stage(
        RequestId(request_id), described.incarnation, 0, suspend=True, reader=MigrationId("m")
    )
    assert isinstance(final, FinalState)
    (local,) = await destination.engine.grow(MigrationId("m"), final.tail.end)
    present = reserved.tokens_present // source.engine.facts.block_tokens
    copy(final.tail.block_ids[present:], local[present:])
    await destination.engine.commit(MigrationId("m"), final)
    await source.engine.release(RequestId(request_id))
    await source.engine.unpin(MigrationId("m"))


async def moved(spoil: Callable[[list[int], list[int]], tuple[list[int], list[int]]]) -> tuple[Rig, Rig]:
    """A request that has moved after three tokens, its copy changed by `spoil`."""
    one, other = Rig(), Rig()
    await one.add("r", 18, 14)
    await until(lambda: len(one.said.get("r", ())) >= 3)

    def copy(remote: list[int], local: list[int]) -> None:
        for theirs, ours in zip(*spoil(remote, local), strict=False):
            other.engine.batcher.pool.content[ours] = one.engine.batcher.pool.content[theirs]

    other._payloads = one._payloads
    other.said["r"] = one.said["r"]
    await move(one, other, "r", copy)
    await other.until_idle()
    return one, other


@in_virtual_time
async def test_a_moved_request_continues_with_the_same_output() -> None:
    one, other = await moved(lambda remote, local: (remote, local))

    assert other.said["r"] == other.expected("r")
    assert one.engine.batcher.pool.num_free == one.settings.num_blocks


@in_virtual_time
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda remote, local: (remote[1:], local[1:]), id="the first block is lost"),
        pytest.param(lambda remote, local: (remote[:-1], local), id="the tail is lost"),
        pytest.param(lambda remote, local: (remote[:2] + remote[:1], local), id="a stale block"),
    ],
)
async def test_a_bad_copy_shows_in_the_output(
    spoil: Callable[[list[int], list[int]], tuple[list[int], list[int]]],
) -> None:
    _, other = await moved(spoil)

    assert len(other.said["r"]) == 14
    assert other.said["r"] != other.expected("r")


@in_virtual_time
async def test_a_reservation_is_refused_without_room_and_given_back_when_dropped() -> None:
    one, other = Rig(), Rig(num_blocks=8)
    await one.add("r", 20, 10)
    await until(lambda: one.said)
    described = await one.engine.describe(RequestId("r"))

    await other.engine.reserve(MigrationId("m"), described)
    with pytest.raises(DestinationRefusedError, match="no 8 free KV blocks"):
        await other.engine.reserve(MigrationId("again"), described)
    with pytest.raises(DestinationRefusedError, match="more free KV blocks"):
        await other.engine.grow(MigrationId("m"), 8 * 4 + 1)
    await other.engine.drop(MigrationId("m"))

    assert other.engine.batcher.pool.num_free == 8
    assert await other.engine.check_integrity() == []


@in_virtual_time
async def test_a_newer_copy_of_a_request_ends_an_older_one() -> None:
    """A recompute of a request that is here, and the arrival of an older copy after it."""
    rig = Rig()
    await rig.add("r", 10, 30)
    await until(lambda: len(rig.said.get("r", [])) >= 3)
    described = await rig.engine.describe(RequestId("r"))
    final = await rig.engine.next_stage(RequestId("r"), 0, 0, suspend=True, reader=MigrationId("m"))
    assert isinstance(final, FinalState)
    payload = rig._payloads["r"].encode()
    assert await rig.engine.add(payload, "client", epoch=1000, output_token_ids=rig.said["r"].copy())
    assert rig.ended == ["r"]
    rig.ended.clear()
    await rig.engine.unpin(MigrationId("m"))
    await rig.engine.reserve(MigrationId("m"), described)
    with pytest.raises(DestinationRefusedError, match="a newer copy of the request is here"):
        await rig.engine.commit(MigrationId("m"), final)
    await rig.engine.drop(MigrationId("m"))
    assert not await rig.engine.add(payload, "client", epoch=1000, output_token_ids=[])

    await rig.until_idle()

    assert rig.said["r"] == rig.expected("r")


@in_virtual_time
async def test_a_stage_that_is_waited_for_is_not_one_of_the_next_copy() -> None:
    """The old copy ends and the new one begins between two steps."""
    rig = Rig()
    await rig.add("r", 10, 30)
    await until(lambda: rig.said)
    stage = asyncio.create_task(
        rig.engine.next_stage(RequestId("r"), 0, 100, suspend=False, reader=MigrationId("m"))
    )
    payload = rig._payloads["r"].encode()
    assert await asyncio.create_task(rig.engine.add(payload, "client", epoch=1000))
    rig.said.clear()  # what the old copy has sent
    with pytest.raises(SourceGoneError, match="finished"):
        await stage
    rig.ended.clear()
    await rig.until_idle()


@in_virtual_time
async def test_a_preempted_request_cannot_be_moved() -> None:
    rig = Rig(num_blocks=10)
    await rig.add("first", 16, 20)
    await rig.add("victim", 16, 20)
    await asyncio.sleep(0.05)
    described = await rig.engine.describe(RequestId("victim"))
    await until(lambda: rig.engine.batcher.preemptions)

    with pytest.raises(SourceGoneError, match="not running"):
        await rig.engine.describe(RequestId("victim"))
    with pytest.raises(SourceGoneError, match="preempted"):
        await rig.engine.next_stage(
            RequestId("victim"), described.incarnation, 0, suspend=False, reader=MigrationId("m")
        )
    await rig.until_idle()


@pytest.mark.parametrize("chunk_tokens", [None, 64])
@in_virtual_time
async def test_a_budget_for_prompts_keeps_steps_short_for_those_that_decode(chunk_tokens: int | None) -> None:
    rig = Rig(prompt_budget=8, chunk_tokens=chunk_tokens)
    await rig.add("decodes", 4, 12)
    await until(lambda: rig.said.get("decodes"))
    await rig.add("prompt", 40, 2)
    before = len(rig.said["decodes"])
    await until(lambda: rig.said.get("prompt"))
    assert len(rig.said["decodes"]) - before == 40 // 8
    assert rig.loads[-1].step_prompt_tokens == 8
    await rig.until_idle()
    assert rig.said["prompt"] == rig.expected("prompt")
