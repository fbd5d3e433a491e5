"""A vLLM engine in this process whose steps are watched. Set the environment before one is made."""

import asyncio
import gc
import random
import time
from typing import TYPE_CHECKING, Any

from migration.engine_interface import EngineEvents
from pd_serve.errors import EngineDeadError
from pd_serve.platform.cpu import is_cpu_build
from pd_serve.profiling.profile_points import DECODE_STEPS, Limits, Point, StepSeen

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.core import EngineCore

CLIENT = "profile"

#: A point takes fractions of a second with the tiny model; a large one on a CPU takes its time.
POINT_S = 600.0


class StepWatch:
    """Writes down what the steps of an engine core do, and how long each takes. On the step thread.

    Attributes:
        held: While set, steps do nothing: requests gather, to begin in one step.
        steps: Those followed by another one at once, oldest first.
    """

    def __init__(self, core: "EngineCore") -> None:
        self.held = False
        self.steps: list[StepSeen] = []
        self._core = core
        self._step = core.step_fn
        self._schedule = core.scheduler.schedule
        self._scheduled: list[tuple[int, int, int]] = []
        self._began: float | None = None
        core.step_fn = self._watched_step
        core.scheduler.schedule = self._watched_schedule

    def _watched_step(self) -> tuple[dict[int, "EngineCoreOutputs"], bool]:
        now = time.perf_counter()
        if self._began is not None:
            self._note((now - self._began) * 1e3)
            self._began = None
        if self.held:
            return {}, False
        self._scheduled = []
        outputs, executed = self._step()
        # With nothing left to do the loop sleeps: the time until the next step says nothing.
        if self._scheduled and self._core.scheduler.has_requests():
            self._began = now
        return outputs, executed

    def _watched_schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        requests = self._core.scheduler.requests
        # The scheduler counts the tokens of this step as computed already.
        self._scheduled = [
            (number, requests[name].num_computed_tokens - number, requests[name].num_prompt_tokens)
            for name, number in output.num_scheduled_tokens.items()
        ]
        return output

    def _note(self, ms: float) -> None:
        chunks = tuple((number, before) for number, before, prompt in self._scheduled if before < prompt)
        contexts = [before for _, before, prompt in self._scheduled if before >= prompt]
        self.steps.append(StepSeen(chunks, len(contexts), sum(contexts), ms))


class MeasuredEngine:
    """Made and used on one event loop.

    Args:
        engine_args: Arguments of vLLM's `AsyncEngineArgs`.
        num_threads: Threads that compute a step.
    """

    def __init__(self, engine_args: dict[str, Any], num_threads: int) -> None:
        from vllm.v1.serial_utils import MsgpackEncoder

        from migration.vllm_engine.adapter import VllmEngine

        # A step is to be over when its outputs are there, not while the next one is being computed.
        self._engine_args = engine_args | {"async_scheduling": False}
        self._num_threads = num_threads
        self._loop = asyncio.get_running_loop()
        events = EngineEvents(
            on_prefill_started=lambda ids: None,
            on_requests_ended=lambda ids: None,
            on_load=lambda load: None,
            on_death=self._died,
        )
        self._engine = VllmEngine(self._make_config, self._take, events)
        self._outputs = MsgpackEncoder()
        self._requests = MsgpackEncoder()
        self._watch: StepWatch
        self._serial = 0
        self._left = 0
        self._all_ended: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Loads the model. Raises: whatever vLLM raises."""
        await self._engine.start()
        self._watch = StepWatch(self._engine.core)
        gc.collect()
        gc.freeze()  # as an instance does

    async def close(self) -> None:
        await self._engine.stop()
        if self._engine.core is not None:
            await asyncio.to_thread(self._engine.core.shutdown)

    @property
    def limits(self) -> Limits:
        facts = self._engine.facts
        scheduling = self._engine.core.vllm_config.scheduler_config
        return Limits(
            step_tokens=scheduling.max_num_batched_tokens,
            batch_size=scheduling.max_num_seqs,
            model_tokens=facts.max_model_len,
            cache_tokens=(facts.num_blocks - 1) * facts.block_tokens,  # vLLM keeps a block for itself
        )

    @property
    def about(self) -> dict[str, int]:
        """What a simulated engine needs to be like this one, beside the time of its steps."""
        facts, limits = self._engine.facts, self.limits
        block_bytes = sum(region.block_bytes for region in self._engine.regions)
        return {
            "num_blocks": facts.num_blocks,
            "block_tokens": facts.block_tokens,
            "max_num_seqs": limits.batch_size,
            "max_num_batched_tokens": limits.step_tokens,
            "kv_bytes_per_token": block_bytes // facts.block_tokens,
            "threads": self._num_threads,
        }

    async def steps(self, point: Point, dice: random.Random) -> list[StepSeen]:
        """All steps that it takes to get to a point's and through it, with prompts nobody has sent before.

        Raises:
            EngineDeadError: A step has failed.
        """
        num_tokens = 2 if point.phase == "prefill" else DECODE_STEPS
        self._all_ended = self._loop.create_future()
        self._left = point.batch_size
        self._watch.held = True
        vocabulary = self._engine.core.vllm_config.model_config.get_vocab_size()
        for _ in range(point.batch_size):
            prompt = [dice.randrange(vocabulary) for _ in range(point.tokens)]
            await self._engine.add(self._payload(prompt, num_tokens), CLIENT)
        self._watch.steps.clear()
        self._watch.held = False
        async with asyncio.timeout(POINT_S):
            await self._all_ended
        return list(self._watch.steps)

    def _payload(self, prompt: list[int], max_tokens: int) -> list[bytes]:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        self._serial += 1
        request = EngineCoreRequest(
            request_id=f"{CLIENT}-{self._serial}",
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0),
            pooling_params=None,
            arrival_time=float(self._serial),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        return [bytes(frame) for frame in self._requests.encode(request)]

    def _make_config(self) -> Any:
        import torch
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext

        torch.set_num_threads(self._num_threads)  # of the thread that steps the engine, which calls this
        # The context decides a few defaults; these are an instance's.
        context = UsageContext.ENGINE_CONTEXT if is_cpu_build() else UsageContext.OPENAI_API_SERVER
        return AsyncEngineArgs(**self._engine_args).create_engine_config(context)

    def _take(self, client: str, outputs: "EngineCoreOutputs", spans: list[tuple[int, int]]) -> None:
        self._outputs.encode(outputs)  # what an instance does with them before it sends them
        self._left -= sum(output.finish_reason is not None for output in outputs.outputs)
        if not self._left:
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._all_ended is not None and not self._all_ended.done():
            self._all_ended.set_result(None)

    def _died(self, error: BaseException) -> None:
        if self._all_ended is not None and not self._all_ended.done():
            self._all_ended.set_exception(EngineDeadError(f"a step has failed: {error}"))
