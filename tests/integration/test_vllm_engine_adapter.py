"""`VllmEngine` over vLLM's own `EngineCore` with the tiny model: one engine for all tests but the last."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Collection, Iterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from migration.messages import MigrationId, RequestId, stem_of
from pd_serve.errors import DestinationRefusedError, EngineDeadError, SourceGoneError
from tests.integration.instance_environment import instance_environment

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

PROMPT = [(7 * i) % 200 + 20 for i in range(300)]  # computed in two chunks


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with instance_environment():
        yield


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(environment: None) -> AsyncIterator[Any]:
    from tests.integration.engine_rig import EngineRig

    rig = EngineRig()
    await rig.engine.start()
    yield rig
    await rig.close()


@pytest_asyncio.fixture(loop_scope="module")
async def rig(shared: Any) -> AsyncIterator[Any]:
    """The shared engine, which has to be at rest afterwards."""
    yield shared
    assert await shared.engine.live_requests() == []
    await at_rest(shared)
    shared.streams.clear()
    shared.clients.clear()
    shared.ended.clear()


async def at_rest(rig: Any) -> None:
    """The runner forgets requests one step after the scheduler."""
    async with asyncio.timeout(60):
        while problems := await rig.engine.check_integrity():
            if problems[0].startswith("the model runner keeps state"):
                await asyncio.sleep(0.01)
            else:
                raise AssertionError(problems)
    pool = rig.engine.core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def sampling(name: str, max_tokens: int) -> Any:
    from tests.integration.engine_rig import greedy, seeded

    return {
        "greedy": lambda: greedy(max_tokens),
        "penalties": lambda: greedy(max_tokens, presence_penalty=0.7, frequency_penalty=0.4),
        "seeded": lambda: seeded(max_tokens),
        "seeded, top-k, min-p": lambda: seeded(max_tokens, top_k=20, min_p=0.01, repetition_penalty=1.1),
    }[name]()


SAMPLINGS = ["greedy", "penalties", "seeded", "seeded, top-k, min-p"]


async def test_an_engine_with_nothing_to_do_tells_its_load_however_soon_after_the_last_one(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else would tell that blocks have become free."""
    from migration.vllm_engine import adapter
    from tests.integration.engine_rig import eventually, greedy

    monkeypatch.setattr(adapter, "LOAD_INTERVAL_S", 1e9)
    monkeypatch.setattr(adapter, "PROGRESS_INTERVAL_S", 1e9)
    rig.loads.clear()

    await rig.generate("r", [1, 2, 3], greedy(3))

    await eventually(lambda: rig.loads)
    pool = rig.engine.core.scheduler.kv_cache_manager.block_pool
    assert (rig.loads[-1].running, rig.loads[-1].free_blocks) == (0, pool.get_num_free_blocks())


async def test_this_vllm_has_all_names_that_migration_uses(rig: Any) -> None:
    from migration.vllm_engine import compatibility as support

    assert support.missing_names() == []
    assert support.missing_attributes(rig.engine.core) == []
    assert rig.engine.no_migration is None
    assert rig.engine.regions


async def test_engines_differ_by_how_their_attention_reads_a_block(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same shape of blocks on a CPU with other instructions, or under another backend."""
    from migration.vllm_engine import worker

    core = rig.engine.core
    ours = core.collective_rpc(worker.attention)[0]
    assert ours.items() <= rig.engine.compatibility.items()
    assert rig.engine.compatibility["KV layout"].startswith("L")
    (group,) = core.model_executor.driver_worker.worker.model_runner.attn_groups[0]
    monkeypatch.setattr(group.metadata_builders[0], "isa", "another")
    monkeypatch.setattr(group, "kernel_block_size", 16)
    monkeypatch.setattr(group.backend, "get_name", lambda: "ANOTHER")
    theirs = core.collective_rpc(worker.attention)[0]
    assert theirs.keys() == ours.keys()
    assert not theirs.items() & ours.items()


async def test_a_step_that_hangs_ends_all_progress_and_an_idle_engine_is_not_busy(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.integration.engine_rig import eventually, greedy

    await eventually(lambda: not rig.engine.progress.is_busy)
    ends = threading.Event()
    step = rig.engine.core.step_fn

    def hang() -> Any:
        ends.wait(60)
        return step()

    monkeypatch.setattr(rig.engine.core, "step_fn", hang)
    adding = asyncio.create_task(rig.add("r", PROMPT[:40], greedy(5)))
    await eventually(lambda: rig.engine.progress.is_busy)
    await asyncio.sleep(0.2)
    stands = rig.engine.progress
    await asyncio.sleep(0.2)
    assert rig.engine.progress == stands
    ends.set()
    stream = await adding
    await eventually(lambda: len(stream.tokens) == 5)
    assert rig.engine.progress.steps > stands.steps
    await eventually(lambda: not rig.engine.progress.is_busy)


async def test_decoding_requests_can_be_moved(rig: Any) -> None:
    """What decodes here, with what a choice goes by; not what has left, nor what is of a kind that stays."""
    from tests.integration.engine_rig import eventually, greedy

    first = await rig.add("first", PROMPT[:40], greedy(200))
    second = await rig.add("second", PROMPT[:70], greedy(200))
    own_transfer = {"kv_transfer_params": {"do_remote_decode": False}}
    stays = await rig.add("stays", PROMPT[:10], greedy(200, extra_args=own_transfer))
    await eventually(lambda: first.tokens and second.tokens and stays.tokens)
    found = await rig.engine.running_requests()
    assert [(request.request_id, request.priority) for request in found] == [("first", 0), ("second", 0)]
    assert found[1].arrived_at > found[0].arrived_at
    assert 70 < found[1].num_tokens <= 70 + len(second.tokens) + 2
    await rig.leave("first")
    assert [request.request_id for request in await rig.engine.running_requests()] == ["second"]
    await rig.finish(second)
    await rig.finish(stays)
    assert await rig.engine.running_requests() == []


async def test_held_blocks_are_counted_by_request(rig: Any) -> None:
    """Of what runs here, and of what is on its way here; the page counts both."""
    from tests.integration.engine_rig import eventually, greedy

    leaving = await rig.add("r", PROMPT[:40], greedy(200))
    await eventually(lambda: leaving.tokens)
    ((request_id, blocks, arriving),) = await rig.engine.held_blocks()
    assert (request_id, arriving) == ("r", False)
    assert 2 <= blocks <= -(-(40 + len(leaving.tokens) + 2) // 32)
    baggage = await rig.leave("r")
    assert await rig.engine.held_blocks() == []
    await rig.engine.reserve(MigrationId("m"), baggage.description)
    ((request_id, blocks, arriving),) = await rig.engine.held_blocks()
    assert (request_id, arriving) == ("r", True)
    assert blocks >= len(baggage.blocks)
    await rig.engine.drop(MigrationId("m"))
    assert await rig.engine.held_blocks() == []


async def test_outputs_are_sent_again_from_any_index_and_with_the_end(rig: Any) -> None:
    """Of a running request, of one that has ended, and not of one whose outputs have logprobs."""
    from tests.integration.engine_rig import Stream, eventually, greedy

    async def held() -> dict[str, tuple[int, bool]]:
        visited = await rig.engine.visit_requests(dict)
        return {h.request_id: (h.emitted, h.finished) for held in visited.values() for h in held}

    stream = await rig.add("again", PROMPT[:40], greedy(200))
    await eventually(lambda: len(stream.tokens) > 3)
    emitted, finished = (await held())["again"]
    assert emitted >= len(stream.tokens)
    assert not finished
    whole = await rig.finish(stream)
    assert (await held())["again"] == (200, True)

    again = rig.streams["again"] = Stream(tokens=whole[:150])
    await rig.engine.resend([(RequestId("again"), 150), (RequestId("unknown"), 0)])
    await eventually(lambda: again.ended)
    assert again.tokens == whole

    stream = await rig.add("logprobs", PROMPT[:40], greedy(5, logprobs=1))
    await rig.finish(stream)
    assert "logprobs" not in await held()


async def test_a_running_request_is_sent_again(rig: Any) -> None:
    from tests.integration.engine_rig import Stream, eventually, greedy

    whole = await rig.generate("whole", PROMPT[:40], greedy(400))
    first = await rig.add("again", PROMPT[:40], greedy(400))
    await eventually(lambda: first.tokens)
    again = rig.streams["again"] = Stream(tokens=whole[:1])  # everything that was sent so far is lost
    await asyncio.gather(
        rig.engine.resend([(RequestId("again"), 1)]),
        eventually(lambda: again.ended),
    )
    assert again.tokens == whole


class TestSameTokens:
    @pytest.mark.parametrize("name", SAMPLINGS)
    async def test_a_request_that_leaves_and_returns_has_the_same_tokens(self, rig: Any, name: str) -> None:
        """What leaves is all that counts: blocks, tokens, and the state of a seeded request's generator."""
        from tests.integration.engine_rig import eventually

        # Far more tokens than the last place to leave at: it must not be finished by then on a busy machine.
        expected = await rig.generate("alone", PROMPT, sampling(name, 120))
        assert len(set(expected)) > 5, "nothing would show"
        stream = await rig.add("r", PROMPT, sampling(name, 120))
        back_at = 0  # a request that has come back runs again with its next token
        for number, num_tokens in enumerate((1, 20, 33)):
            wanted = max(num_tokens, back_at + 1)
            await eventually(lambda n=wanted: len(stream.tokens) >= n)
            baggage = await rig.leave("r")
            assert (baggage.final.rng_state is not None) == name.startswith("seeded")
            assert len(baggage.blocks) == -(-baggage.final.num_computed_tokens // 32)
            back_at = len(baggage.final.output_token_ids)
            await rig.come_back(baggage, f"m{number}")
        assert await rig.finish(stream) == expected
        assert sorted(set(stream.epochs)) == [0, 1, 2, 3]

    @pytest.mark.parametrize("name", SAMPLINGS)
    async def test_a_recomputed_request_has_the_same_tokens(self, rig: Any, name: str) -> None:
        """Without blocks and generator state: its owner has died."""
        from tests.integration.engine_rig import CLIENT, Stream, payload

        expected = await rig.generate("alone", PROMPT, sampling(name, 40))
        stream = rig.streams["r"] = Stream(expected[:25], [0] * 25)
        await rig.engine.add(
            payload("r", PROMPT, sampling(name, 40)), CLIENT, epoch=1, output_token_ids=expected[:25]
        )
        assert await rig.finish(stream) == expected
        assert stream.epochs[24:26] == [0, 1]

    async def test_a_request_that_is_taken_back_has_the_same_tokens(self, rig: Any) -> None:
        """Suspended, its final state sent, and nobody wants it: it goes on under the epoch it is given."""
        from tests.integration.engine_rig import eventually

        expected = await rig.generate("alone", PROMPT, sampling("seeded", 40))
        stream = await rig.add("r", PROMPT, sampling("seeded", 40))
        await eventually(lambda: len(stream.tokens) >= 5)
        final = await rig.engine.next_stage(RequestId("r"), 0, 99, suspend=True, reader=MigrationId("m"))
        await rig.engine.unpin(MigrationId("m"))
        await rig.engine.resume(RequestId("r"), final.epoch + 2)
        assert await rig.finish(stream) == expected
        assert set(stream.epochs) == {0, 2}


class TestStays:
    """Each stay of a request has an id of its own in the engine: none can be taken for another."""

    async def test_a_request_is_recomputed_where_it_runs(self, rig: Any) -> None:
        """Its old copy ends and the new one begins between the same two steps."""
        from tests.integration.engine_rig import CLIENT, Stream, eventually, payload

        expected = await rig.generate("alone", PROMPT, sampling("seeded", 40))
        old = await rig.add("r", PROMPT, sampling("seeded", 40))
        await eventually(lambda: len(old.tokens) >= 5)
        stream = rig.streams["r"] = Stream(expected[:3], [0] * 3, epoch=1000)
        again = payload("r", PROMPT, sampling("seeded", 40))
        async with rig.one_boundary():
            ended = asyncio.create_task(rig.engine.abort([RequestId("r")], 1000))
            added = asyncio.create_task(
                rig.engine.add(again, CLIENT, epoch=1000, output_token_ids=expected[:3])
            )
        assert await ended == []
        assert await added
        assert await rig.finish(stream) == expected
        assert not rig.deaths

    async def test_a_request_comes_back_in_the_step_in_which_it_left(self, rig: Any) -> None:
        from tests.integration.engine_rig import eventually

        expected = await rig.generate("alone", PROMPT, sampling("greedy", 60))
        stream = await rig.add("r", PROMPT, sampling("greedy", 60))
        await eventually(lambda: len(stream.tokens) >= 3)
        baggage = await rig.leave("r", release=False)
        await rig.arrive(baggage, "m")
        async with rig.one_boundary():
            left = asyncio.create_task(rig.engine.release(RequestId("r")))
            back = asyncio.create_task(rig.engine.commit(MigrationId("m"), baggage.final))
        await left
        await back
        assert await rig.finish(stream) == expected
        assert not rig.deaths

    async def test_a_newer_copy_ends_an_older_one(self, rig: Any) -> None:
        """A recompute that was not preceded by an abort, and the arrival of what had left before it."""
        from tests.integration.engine_rig import CLIENT, Stream, eventually, payload

        expected = await rig.generate("alone", PROMPT, sampling("greedy", 40))
        stream = await rig.add("r", PROMPT, sampling("greedy", 40))
        await eventually(lambda: len(stream.tokens) >= 3)
        baggage = await rig.leave("r", release=False)
        stream = rig.streams["r"] = Stream(expected[:3], [0] * 3, epoch=1000)
        again = payload("r", PROMPT, sampling("greedy", 40))
        assert await rig.engine.add(again, CLIENT, epoch=1000, output_token_ids=expected[:3])
        assert rig.ended[-1] == "r"
        with pytest.raises(DestinationRefusedError, match="a newer copy of the request is here"):
            await rig.come_back(baggage, "m")
        await rig.engine.drop(MigrationId("m"))
        assert not await rig.engine.add(again, CLIENT, epoch=1000, output_token_ids=expected[:3])
        assert await rig.finish(stream) == expected


_stems = (f"mine.{number}" for number in itertools.count())


def ids_of_one_stem() -> list[RequestId]:
    """That no other test has: an engine finds requests that have ended lately."""
    stem = next(_stems)
    return [RequestId(f"{stem}-{number}") for number in range(3)]


class TestAdoption:
    """A request whose client is gone goes on as another one, of another client."""

    async def adopt(
        self,
        rig: Any,
        request_id: RequestId,
        living: Collection[str] = ("new",),
        name: str = "seeded",
    ) -> bool:
        from tests.integration.engine_rig import payload

        again = payload(request_id, PROMPT, sampling(name, 60))
        adopted: bool = await rig.engine.adopt(request_id, again, "new", living)
        return adopted

    async def whole(self, rig: Any, request_id: RequestId, expected: list[int]) -> None:
        from tests.integration.engine_rig import eventually

        await eventually(lambda: request_id in rig.streams and rig.streams[request_id].ended)
        assert rig.streams[request_id].tokens == expected
        assert set(rig.streams[request_id].epochs) == {0}
        assert rig.clients[request_id] == "new"
        assert not rig.deaths

    @pytest.mark.parametrize("name", SAMPLINGS)
    async def test_it_goes_on_with_the_same_tokens_and_sends_all_of_them(self, rig: Any, name: str) -> None:
        from tests.integration.engine_rig import eventually

        first, second, third = ids_of_one_stem()
        expected = await rig.generate("alone", PROMPT, sampling(name, 60))
        stream = await rig.add(first, PROMPT, sampling(name, 60))
        await eventually(lambda: len(stream.tokens) >= 10)
        assert await rig.engine.clients_of(stem_of(first)) == {"client"}
        assert not await self.adopt(rig, second, living={"client", "new"}, name=name), "its client lives"
        assert not await self.adopt(rig, RequestId("other.digest-2"), name=name)
        assert await self.adopt(rig, second, name=name)
        assert not await self.adopt(rig, third, name=name), "it has been adopted"
        assert await rig.engine.abort([first]) == [first], "its former client cannot end it"
        assert await rig.engine.live_requests() == [second]
        await eventually(lambda: first in rig.ended)
        await self.whole(rig, second, expected)
        assert not stream.ended

    async def test_it_can_be_moved_under_its_new_id(self, rig: Any) -> None:
        from tests.integration.engine_rig import eventually, payload

        first, second, _ = ids_of_one_stem()
        expected = await rig.generate("alone", PROMPT, sampling("seeded", 60))
        stream = await rig.add(first, PROMPT, sampling("seeded", 60), handoff=True)
        await eventually(lambda: len(stream.tokens) >= 10)
        assert await self.adopt(rig, second)
        baggage = await rig.leave(second)
        assert baggage.description.payload == payload(second, PROMPT, sampling("seeded", 60))
        assert baggage.description.client == "new"
        await rig.come_back(baggage)
        await eventually(lambda: rig.streams[second].ended)
        assert rig.streams[second].tokens == expected

    @pytest.mark.parametrize("step", ["described", "staged", "waiting", "suspended", "committed elsewhere"])
    async def test_it_stays_where_it_is_in_the_middle_of_a_migration(self, rig: Any, step: str) -> None:
        from tests.integration.engine_rig import eventually

        first, second, _ = ids_of_one_stem()
        engine, reader = rig.engine, MigrationId("leaving")
        expected = await rig.generate("alone", PROMPT, sampling("seeded", 60))
        stream = await rig.add(first, PROMPT, sampling("seeded", 60))
        await eventually(lambda: len(stream.tokens) >= 5)
        description = await engine.describe(first)
        if step == "staged":
            await engine.next_stage(first, description.incarnation, 0, suspend=False, reader=reader)
        elif step == "suspended":
            await engine.next_stage(first, description.incarnation, 0, suspend=True, reader=reader)
        elif step == "committed elsewhere":
            await rig.leave(first, release=False)
        if step == "waiting":
            async with rig.one_boundary():
                stage = asyncio.create_task(
                    engine.next_stage(first, description.incarnation, 0, suspend=True, reader=reader)
                )
                await asyncio.sleep(0)
                adopting = asyncio.create_task(self.adopt(rig, second))
            with pytest.raises(SourceGoneError):
                await stage
            assert await adopting
        else:
            assert await self.adopt(rig, second)
        # What its migration does then: the source releases it, or takes it back, and unpins its blocks.
        with pytest.raises(SourceGoneError):
            await engine.next_stage(first, description.incarnation, 0, suspend=True, reader=reader)
        await engine.release(first)
        await engine.resume(first, 2)
        await engine.unpin(reader)
        await self.whole(rig, second, expected)

    async def test_it_stays_where_it_has_come_to_although_it_is_withdrawn(self, rig: Any) -> None:
        from tests.integration.engine_rig import eventually

        first, second, _ = ids_of_one_stem()
        expected = await rig.generate("alone", PROMPT, sampling("seeded", 60))
        stream = await rig.add(first, PROMPT, sampling("seeded", 60))
        await eventually(lambda: len(stream.tokens) >= 5)
        baggage = await rig.leave(first)
        await rig.arrive(baggage)
        assert await rig.engine.clients_of(stem_of(first)) == set(), "it is on its way"
        assert not await self.adopt(rig, second)
        await rig.engine.commit(MigrationId("m"), baggage.final)
        assert await self.adopt(rig, second)
        await rig.engine.drop(MigrationId("m"))
        await rig.engine.publish(MigrationId("m"))
        await self.whole(rig, second, expected)

    async def test_it_waits_for_its_first_step(self, rig: Any) -> None:
        from tests.integration.engine_rig import CLIENT, payload

        first, second, _ = ids_of_one_stem()
        expected = await rig.generate("alone", PROMPT, sampling("seeded", 60))
        async with rig.one_boundary():
            sent = payload(first, PROMPT, sampling("seeded", 60))
            added = asyncio.create_task(rig.engine.add(sent, CLIENT))
            await asyncio.sleep(0)
            adopting = asyncio.create_task(self.adopt(rig, second))
        assert await added
        assert await adopting
        await self.whole(rig, second, expected)
        assert first not in rig.streams

    async def test_it_is_being_recomputed(self, rig: Any) -> None:
        from tests.integration.engine_rig import CLIENT, payload

        first, second, _ = ids_of_one_stem()
        expected = await rig.generate("alone", PROMPT, sampling("seeded", 60))
        sent = payload(first, PROMPT, sampling("seeded", 60))
        async with rig.one_boundary():
            added = asyncio.create_task(
                rig.engine.add(sent, CLIENT, epoch=1000, output_token_ids=expected[:30])
            )
            await asyncio.sleep(0)
            adopting = asyncio.create_task(self.adopt(rig, second))
        assert await added
        assert await adopting
        await self.whole(rig, second, expected)

    async def test_its_end_is_sent_if_it_has_ended(self, rig: Any) -> None:
        first, second, third = ids_of_one_stem()
        expected = await rig.generate(first, PROMPT, sampling("seeded", 60))
        assert await rig.engine.clients_of(stem_of(first)) == {"client"}
        assert not await self.adopt(rig, second, living={"client", "new"})
        assert await self.adopt(rig, second)
        assert not await self.adopt(rig, third)
        await self.whole(rig, second, expected)

    async def test_a_copy_that_is_here_under_the_new_id_is_not_replaced(self, rig: Any) -> None:
        """The call was late, and the request has been started anew meanwhile."""
        from tests.integration.engine_rig import eventually

        first, second, _ = ids_of_one_stem()
        stream = await rig.add(first, PROMPT, sampling("seeded", 60))
        again = await rig.add(second, PROMPT, sampling("seeded", 60), epoch=1000)
        await eventually(lambda: stream.tokens and again.tokens)
        assert not await self.adopt(rig, second)
        assert await rig.finish(again) == await rig.finish(stream)


class TestRefusals:
    @pytest_asyncio.fixture(loop_scope="module")
    async def baggage(self, rig: Any) -> Any:
        from tests.integration.engine_rig import eventually, greedy

        stream = await rig.add("r", PROMPT[:40], greedy(100))
        await eventually(lambda: len(stream.tokens) >= 2)
        return await rig.leave("r")

    async def test_a_request_that_is_not_running_here_is_not_described(self, rig: Any) -> None:
        with pytest.raises(SourceGoneError):
            await rig.engine.describe(RequestId("nobody"))
        with pytest.raises(SourceGoneError):
            await rig.engine.next_stage(RequestId("nobody"), 0, 0, suspend=False, reader=MigrationId("m"))
        await rig.engine.resume(RequestId("nobody"), 5)
        await rig.engine.release(RequestId("nobody"))
        await rig.engine.drop(MigrationId("none"))

    async def test_a_request_that_begins_is_described_as_later_but_for_its_tokens(
        self, rig: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tests.integration.engine_rig import eventually, greedy

        started: list[Any] = []
        monkeypatch.setattr(rig, "on_prefill_started", started.extend)
        stays = await rig.add("s", PROMPT[:40], greedy(30))
        stream = await rig.add("r", PROMPT[:40], greedy(100), handoff=True)
        await eventually(lambda: len(stream.tokens) >= 2)
        later = await rig.engine.describe(RequestId("r"))
        assert started == [msgspec.structs.replace(later, output_token_ids=[])]
        await rig.finish(stream)
        await rig.finish(stays)

    async def test_a_request_that_cannot_move_runs_on(
        self, rig: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tests.integration.engine_rig import eventually, greedy

        started: list[Any] = []
        expected = await rig.generate("alone", PROMPT[:40], greedy(30))
        own_transfer = {"kv_transfer_params": {"do_remote_decode": False}}
        monkeypatch.setattr(rig, "on_prefill_started", started.extend)
        stream = await rig.add("r", PROMPT[:40], greedy(30, extra_args=own_transfer), handoff=True)
        await eventually(lambda: stream.tokens)
        assert started == []
        with pytest.raises(DestinationRefusedError, match="a request with a KV transfer of its own"):
            await rig.engine.describe(RequestId("r"))
        assert rig.unmovable["kv_transfer"] == 1
        assert await rig.finish(stream) == expected
        await eventually(lambda: set(rig.unmovable.values()) == {0})

    @pytest.mark.parametrize(
        "name",
        [
            "vllm version",
            "model",
            "model configuration",
            "dtype",
            "quantization",
            "KV cache dtype",
            "block size",
            "tensor parallel size",
            "KV heads",
            "KV layout",
            "order of a KV block",
            "attention backend",
            "kernel block size",
            "packing of keys",
        ],
    )
    async def test_a_different_engine_is_refused(self, rig: Any, baggage: Any, name: str) -> None:
        ours = rig.engine.compatibility
        assert baggage.description.compatibility == ours
        theirs = baggage.with_description(compatibility=ours | {name: "something else"})
        with pytest.raises(DestinationRefusedError, match=f"^{name} differs: something else there, .* here$"):
            await rig.engine.reserve(MigrationId("m"), theirs)

    async def test_an_engine_without_a_property_is_refused(self, rig: Any, baggage: Any) -> None:
        with pytest.raises(DestinationRefusedError, match="differs: None there"):
            await rig.engine.reserve(MigrationId("m"), baggage.with_description(compatibility={}))

    async def test_a_request_that_is_too_long_is_refused(self, rig: Any, baggage: Any) -> None:
        long = baggage.with_description(max_total_tokens=2049)
        with pytest.raises(DestinationRefusedError, match="2049 tokens do not fit this instance's 2048"):
            await rig.engine.reserve(MigrationId("m"), long)

    @pytest.mark.parametrize("frames", [[b""], [b"\xc1"], [b"\x93\x01\x02\x03"], []])
    async def test_an_unreadable_request_is_refused(
        self, rig: Any, baggage: Any, frames: list[bytes]
    ) -> None:
        with pytest.raises(DestinationRefusedError, match="cannot be read"):
            await rig.engine.reserve(MigrationId("m"), baggage.with_description(payload=frames))
        with pytest.raises((msgspec.MsgspecError, ValueError, TypeError, LookupError)):
            await rig.engine.add(frames, "client")
        assert not rig.deaths

    async def test_a_request_that_vllm_refuses_raises_its_error(self, rig: Any) -> None:
        from vllm.pooling_params import PoolingParams

        from tests.integration.engine_rig import CLIENT, payload

        with pytest.raises(ValueError, match="Unsupported task"):
            await rig.engine.add(payload("r", PROMPT, pooling_params=PoolingParams(task="embed")), CLIENT)

    async def test_a_commit_is_refused_after_the_client_left(self, rig: Any, baggage: Any) -> None:
        from tests.integration.engine_rig import CLIENT, greedy

        migration_id = MigrationId("m")
        await rig.engine.reserve(migration_id, baggage.description)
        await rig.engine.abort_client(CLIENT)
        with pytest.raises(DestinationRefusedError, match="client has gone"):
            await rig.engine.commit(migration_id, baggage.final)
        await rig.engine.drop(migration_id)
        assert len(await rig.generate("next", PROMPT[:40], greedy(3))) == 3

    async def test_a_withdrawn_commit_ends_the_request(self, rig: Any, baggage: Any) -> None:
        num_tokens = len(rig.streams["r"].tokens)
        await rig.come_back(baggage)
        await rig.engine.drop(MigrationId("m"))
        await at_rest(rig)
        assert not rig.streams["r"].ended
        assert set(rig.streams["r"].epochs[num_tokens:]) <= {1}

    async def test_an_abort_spares_requests_of_a_higher_epoch(self, rig: Any, baggage: Any) -> None:
        await rig.come_back(baggage)  # under epoch 1
        ids = [RequestId("r"), RequestId("nobody")]
        assert await rig.engine.abort(ids, below_epoch=1) == ["nobody"]
        assert await rig.engine.live_requests() == ["r"]
        assert await rig.engine.abort(ids, below_epoch=2) == ["nobody"]
        assert await rig.engine.live_requests() == []


class TestUnmovable:
    """Every kind that is refused, on vLLM's own request objects."""

    def request(self, params: Any = None, **attributes: Any) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        params = params or SamplingParams(max_tokens=5)
        pooling_params = attributes.pop("pooling_params", None)
        prompt = attributes.pop("prompt_token_ids", [1, 2, 3])
        return Request("r", prompt, None if pooling_params else params, pooling_params, **attributes)

    async def test_requests_of_most_kinds_move(self) -> None:
        import torch
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import SamplingParams, StructuredOutputsParams

        from migration.vllm_engine.compatibility import unmovable

        assert unmovable(self.request()) is None
        assert unmovable(self.request(SamplingParams(max_tokens=5, seed=1, logprobs=3))) is None
        json_only = StructuredOutputsParams(json_object=True)
        assert unmovable(self.request(SamplingParams(max_tokens=5, structured_outputs=json_only))) is None
        assert unmovable(self.request(SamplingParams(max_tokens=5, thinking_token_budget=4))) is None
        assert unmovable(self.request(lora_request=LoRARequest("adapter", 1, "somewhere"))) is None
        assert unmovable(self.request(prompt_token_ids=None, prompt_embeds=torch.zeros(3, 4))) is None

    async def test_unsupported_requests_do_not_move(self) -> None:
        from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
        from vllm.pooling_params import PoolingParams
        from vllm.sampling_params import SamplingParams

        from migration.vllm_engine.compatibility import UNMOVABLE, unmovable

        image = MultiModalFeatureSpec(
            data=None, modality="image", identifier="i", mm_position=PlaceholderRange(offset=0, length=2)
        )

        def asks_for(**extra: Any) -> Any:
            return self.request(SamplingParams(max_tokens=5, extra_args=extra))

        kinds = {
            "pooling": self.request(pooling_params=PoolingParams(task="embed")),
            "no_data": self.request(mm_features=[image]),
            "session": self.request(resumable=True),
            "kv_transfer": asks_for(kv_transfer_params={"do_remote_prefill": True}),
        }
        for why, request in kinds.items():
            assert unmovable(request) == why
        assert unmovable(asks_for(ec_transfer_params={"any": 1})) == "kv_transfer"
        assert kinds.keys() | {"too_large"} == UNMOVABLE.keys()


async def test_a_failed_step_ends_the_engine(
    shared: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The last test of this engine."""
    from tests.integration.engine_rig import eventually, greedy

    rig = shared

    def fail() -> None:
        raise RuntimeError("out of luck")

    stream = await rig.add("r", PROMPT, greedy(1000))
    await eventually(lambda: stream.tokens)
    monkeypatch.setattr(rig.engine.core, "step_fn", fail)
    await eventually(lambda: rig.deaths)
    assert str(rig.deaths[0]) == "out of luck"
    assert "step loop has failed" in caplog.text
    with pytest.raises(EngineDeadError, match="out of luck"):
        await rig.engine.describe(RequestId("r"))


async def test_an_unknown_vllm_serves_without_migration(
    environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It serves, with vLLM's own scheduler, and gives the reason why nothing moves."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from migration.vllm_engine import compatibility as support
    from tests.integration.engine_rig import EngineRig, eventually, greedy

    name = "vllm.v1.core.sched.scheduler:Scheduler.gone_in_the_next_release"
    monkeypatch.setattr(support, "RELIED_ON", support.RELIED_ON | {name: ()})
    assert support.missing_names() == [name]
    rig = EngineRig()
    await rig.engine.start()
    try:
        assert type(rig.engine.core.scheduler) is Scheduler
        assert name in str(rig.engine.facts.no_migration)
        stream = await rig.add("r", PROMPT, greedy(200), handoff=True)
        await eventually(lambda: stream.tokens)
        request_id, migration_id = RequestId("r"), MigrationId("m")
        for call in (
            rig.engine.describe(request_id),
            rig.engine.next_stage(request_id, 0, 0, suspend=False, reader=MigrationId("m")),
            rig.engine.reserve(migration_id, None),
        ):
            with pytest.raises(DestinationRefusedError, match="migration is off here"):
                await call
        assert len(await rig.finish(stream)) == 200
        assert await rig.engine.live_requests() == []
        await at_rest(rig)
        assert not rig.deaths
    finally:
        await rig.close()
