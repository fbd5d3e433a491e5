"""LoRA adapters of a real engine: loaded with their requests, moved with them, and kept apart."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from migration.messages import MigrationId, RequestId
from pd_serve.errors import DestinationRefusedError, InvalidRequestError, RefusalCode
from pd_serve.models.lora import adapters
from tests.integration.instance_environment import instance_environment

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with instance_environment():
        yield


class Rig:
    """An engine with one slot for adapters, and two adapters."""

    def __init__(self, directory: Path) -> None:
        from tests.integration.engine_rig import EngineRig
        from tests.integration.engine_variants import LORA_ARGUMENTS

        self.rig = EngineRig(**LORA_ARGUMENTS)
        self.engine = self.rig.engine
        self.paths = [
            str(shutil.copytree(path, directory / str(number))) for number, path in enumerate(adapters(2))
        ]

    def adapter(self, which: int, **more: Any) -> Any:
        from vllm.lora.request import LoRARequest

        fields = {"lora_name": f"a{which}", "lora_int_id": 10 + which, "lora_path": self.paths[which]}
        return LoRARequest(**fields | more)

    async def add(self, request_id: str, adapter: Any, num_tokens: int = 60, **parameters: Any) -> Any:
        from tests.integration.engine_rig import CLIENT, Stream, greedy, payload
        from tests.integration.engine_variants import PROMPT

        stream = self.rig.streams[request_id] = Stream()
        frames = payload(request_id, PROMPT, greedy(num_tokens, **parameters), lora_request=adapter)
        assert await self.engine.add(frames, CLIENT)
        return stream

    async def generate(self, adapter: Any, num_tokens: int = 60) -> list[int]:
        tokens: list[int] = await self.rig.finish(await self.add("alone", adapter, num_tokens))
        return tokens

    async def moved(self, request_id: str, stream: Any, at: int = 10) -> Any:
        """A request that has left."""
        from tests.integration.engine_rig import eventually

        await eventually(lambda: len(stream.tokens) >= at)
        return await self.rig.leave(request_id)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(environment: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("adapters"))
    await rig.engine.start()
    yield rig
    await rig.rig.close()


@pytest_asyncio.fixture(loop_scope="module")
async def rig(shared: Rig) -> AsyncIterator[Rig]:
    """The shared engine, which has to be at rest afterwards."""
    yield shared
    await shared.engine.abort_client("client")
    async with asyncio.timeout(60):
        while await shared.engine.check_integrity():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not shared.rig.deaths
    shared.rig.streams.clear()


async def test_a_request_that_leaves_and_returns_has_the_same_tokens(rig: Rig) -> None:
    expected = await rig.generate(rig.adapter(0))
    others = [await rig.generate(None), await rig.generate(rig.adapter(1))]
    assert expected not in others, "the adapters change nothing"
    stream = await rig.add("r", rig.adapter(0))
    for number, at in enumerate((3, 20)):
        baggage = await rig.moved("r", stream, max(at, len(stream.tokens)))
        await rig.generate(rig.adapter(1), 2)  # takes the slot, so that the first one has to be loaded again
        await rig.rig.come_back(baggage, f"m{number}")
    assert await rig.rig.finish(stream) == expected


async def test_a_request_is_refused_where_other_adapters_fill_the_batch(rig: Rig) -> None:
    """It would wait there with its blocks."""
    from tests.integration.engine_rig import eventually

    stream = await rig.add("r", rig.adapter(0), 200)
    baggage = await rig.moved("r", stream)
    other = await rig.add("other", rig.adapter(1), 400)
    await eventually(lambda: other.tokens)
    with pytest.raises(DestinationRefusedError, match="1 other LoRA adapters are in use, of 1") as refused:
        await rig.engine.reserve(MigrationId("m"), baggage.description)
    assert refused.value.refusal.code is RefusalCode.NO_ADAPTER_SLOT
    same = await rig.add("same", rig.adapter(1), 400)
    await eventually(lambda: same.tokens)
    second = await rig.moved("same", same)
    await rig.rig.come_back(second)  # of the adapter that is there


@pytest.mark.parametrize("held", ["arriving", "suspended"])
async def test_the_slot_of_a_request_that_may_come_is_kept(rig: Rig, held: str) -> None:
    """Another adapter's request waits meanwhile: vLLM's scheduler fails with more adapters than slots."""
    from tests.integration.engine_rig import eventually

    expected = await rig.generate(rig.adapter(0))
    stream = await rig.add("r", rig.adapter(0))
    await eventually(lambda: len(stream.tokens) >= 5)
    baggage = await rig.rig.leave("r", release=held == "arriving")
    if held == "arriving":
        await rig.rig.arrive(baggage)
    other = await rig.add("other", rig.adapter(1), 30)
    plain = await rig.add("plain", None, 30)
    await rig.rig.finish(plain)
    assert not other.tokens
    if held == "arriving":
        await rig.engine.commit(MigrationId("m"), baggage.final)
    else:
        await rig.engine.resume(RequestId("r"), baggage.final.epoch + 2)
    assert await rig.rig.finish(stream) == expected
    assert len(await rig.rig.finish(other)) == 30


async def test_the_base_model_answers_alike_beside_adapters(rig: Rig) -> None:
    """On CPUs, vLLM takes the adapter in the last slot for requests that have none."""
    from tests.integration.engine_rig import eventually

    expected = await rig.generate(None)
    other = await rig.add("other", rig.adapter(0), 400)
    await eventually(lambda: other.tokens)
    assert await rig.generate(None) == expected
    assert not other.ended, "they ran in one batch"


async def test_an_adapter_that_cannot_be_loaded_costs_its_request_only(rig: Rig) -> None:
    """In a step, it would end the engine."""
    from tests.integration.engine_rig import eventually

    stream = await rig.add("r", rig.adapter(0), 100)
    missing = rig.adapter(1, lora_name="gone", lora_int_id=99, lora_path="/gone")
    with pytest.raises(Exception, match="gone"):
        await rig.add("other", missing)
    await eventually(lambda: stream.tokens)
    baggage = await rig.moved("r", stream)
    os.rename(rig.paths[0], rig.paths[0] + "-elsewhere")
    try:
        rig.engine.core.remove_lora(10)
        with pytest.raises(DestinationRefusedError, match="adapter cannot be loaded") as refused:
            await rig.engine.reserve(MigrationId("m"), baggage.description)
        assert refused.value.refusal.code is RefusalCode.ADAPTER
    finally:
        os.rename(rig.paths[0] + "-elsewhere", rig.paths[0])


@pytest.mark.parametrize(
    "changes", [{"lora_name": "a0"}, {"lora_int_id": 10}], ids=["its name", "its number"]
)
async def test_an_adapter_that_vllm_would_take_for_another_is_refused(
    rig: Rig, changes: dict[str, Any]
) -> None:
    """Numbers that each front end counts for itself, or an adapter that was replaced under its name."""
    stream = await rig.add("r", rig.adapter(0), 100)
    with pytest.raises(InvalidRequestError, match="cannot run beside"):
        await rig.add("other", rig.adapter(1, **changes))
    await rig.rig.finish(stream)
    expected = await rig.generate(rig.adapter(1))
    assert await rig.generate(rig.adapter(1, **changes)) == expected, "its own weights, once it is alone"


async def test_an_adapter_is_loaded_ahead_and_read_again(rig: Rig) -> None:
    """As operators do; its files have changed in the second case."""
    fields = ("a0", 10, rig.paths[0], None, False)
    expected = await rig.generate(rig.adapter(0))
    weights = Path(rig.paths[0]) / "adapter_model.safetensors"
    former = weights.read_bytes()
    weights.write_bytes((Path(rig.paths[1]) / "adapter_model.safetensors").read_bytes())
    try:
        await rig.engine.utility("load_adapter", *fields, False)
        assert await rig.generate(rig.adapter(0)) == expected, "it is loaded"
        await rig.engine.utility("load_adapter", *fields, True)
        assert await rig.generate(rig.adapter(0)) != expected
        assert 10 in await rig.engine.utility("list_loras")
    finally:
        weights.write_bytes(former)
        await rig.engine.utility("load_adapter", *fields, True)
    assert await rig.generate(rig.adapter(0)) == expected
    with pytest.raises(Exception, match="gone"):
        await rig.engine.utility("load_adapter", "gone", 99, "/gone", None, False, True)


async def test_log_probabilities_of_a_prompt_are_those_of_its_adapter_in_any_batch(rig: Rig) -> None:
    from tests.integration.engine_rig import eventually

    async def of_prompt(adapter: Any) -> list[list[float]]:
        stream = await rig.add("asks", adapter, 1, prompt_logprobs=1)
        await eventually(lambda: stream.ended or rig.rig.deaths)
        assert not rig.rig.deaths
        rows: list[list[float]] = stream.prompt_logprobs
        return rows

    alone = [await of_prompt(adapter) for adapter in (None, rig.adapter(0))]
    assert alone[0] != alone[1]
    others = [await rig.add(f"other{i}", rig.adapter(0), 500) for i in range(2)]
    beside = [await of_prompt(adapter) for adapter in (None, rig.adapter(0))]
    assert not any(other.ended for other in others)
    for rows, expected in zip(beside, alone, strict=True):
        for row, wanted in zip(rows, expected, strict=True):
            assert row == pytest.approx(wanted, abs=1e-3)
