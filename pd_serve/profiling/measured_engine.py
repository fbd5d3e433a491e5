"""An instance's vLLM engine in this process, with its steps recorded. Set the environment beforehand."""

import asyncio
import gc
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from migration.engine_interface import EngineEvents, HeldByClient, HeldRequest
from migration.token_span import TokenSpan
from pd_serve.errors import EngineDeadError
from pd_serve.instance.engine_factory import vllm_config
from pd_serve.profiling.profile_points import DECODE_STEPS, MIXED_CONTEXT, Limits, Point, StepSeen

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.core import EngineCore

CLIENT = "profile"

#: Time for one point, in seconds: a fraction with the tiny model, minutes with a large one on a CPU.
POINT_S = 600.0

#: Prompts that one visit adds beside a decoding batch.
PROMPTS_BESIDE = 4


class StepRecorder:
    """Records what the steps of an engine core do, and how long each takes. Runs on the step thread.

    Attributes:
        held: While set, steps do nothing: requests gather, to begin in one step.
        steps: Those followed by another one at once, oldest first.
        on_step: Called when one has been added to `steps`.
    """

    def __init__(self, core: "EngineCore") -> None:
        self.held = False
        self.steps: list[StepSeen] = []
        self.on_step: Callable[[], object] = lambda: None
        self._core = core
        self._step, core.step_fn = core.step_fn, self._recorded_step
        self._schedule, core.scheduler.schedule = core.scheduler.schedule, self._recorded_schedule
        self._scheduled: list[tuple[int, int, int]] = []
        self._began: float | None = None

    def _recorded_step(self) -> tuple[dict[int, "EngineCoreOutputs"], bool]:
        now = time.perf_counter()
        if self._began is not None:
            chunks = tuple((number, done) for number, done, prompt in self._scheduled if done < prompt)
            contexts = [done for _, done, prompt in self._scheduled if done >= prompt]
            ms = (now - self._began) * 1e3
            self.steps.append(StepSeen(chunks, len(contexts), sum(contexts), ms))
            self._began = None
            self.on_step()
        if self.held:
            return {}, False
        self._scheduled = []
        outputs, executed = self._step()
        # With nothing left to do the loop sleeps, and the time until the next step is not this step's.
        if self._scheduled and self._core.scheduler.has_requests():
            self._began = now
        return outputs, executed

    def _recorded_schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        requests = self._core.scheduler.requests
        # (new tokens, tokens computed before, tokens of the prompt) of each request in this step; the
        # scheduler counts the new tokens as computed already.
        self._scheduled = [
            (number, requests[name].num_computed_tokens - number, requests[name].num_prompt_tokens)
            for name, number in output.num_scheduled_tokens.items()
        ]
        return output


class MeasuredEngine:
    """Made and used on one event loop.

    Args:
        engine_args: Arguments of vLLM's `AsyncEngineArgs`.
        num_threads: Threads that compute a step, as OMP_NUM_THREADS says.
    """

    def __init__(self, engine_args: dict[str, Any], num_threads: int) -> None:
        from vllm.v1.serial_utils import MsgpackEncoder

        from migration.vllm_engine.adapter import VllmEngine

        self._num_threads = num_threads
        self._loop = asyncio.get_running_loop()
        events = EngineEvents(
            on_prefill_started=lambda ids: None,
            on_requests_ended=lambda ids: None,
            on_load=lambda load: None,
            on_death=lambda error: self._end(EngineDeadError(f"a step has failed: {error}")),
        )
        # A step must be over when its outputs are there, not while the next one is being computed.
        arguments = engine_args | {"async_scheduling": False}
        self._engine = VllmEngine(lambda: vllm_config(arguments), self._take, events)
        self._outputs = MsgpackEncoder()
        self._requests = MsgpackEncoder()
        self._recorder: StepRecorder
        self._serial = 0
        self._left = 0
        self._all_ended: asyncio.Future[None] = self._loop.create_future()

    async def start(self) -> None:
        """Loads the model. Raises: whatever vLLM raises."""
        await self._engine.start()
        self._recorder = StepRecorder(self._engine.core)
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
        """The settings of a simulated engine like this one, beside the time of its steps."""
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
        """All steps on the way to a point and through it, with new random prompts.

        Raises:
            EngineDeadError: A step has failed.
        """
        num_tokens = 2 if point.phase == "prefill" else DECODE_STEPS
        context = MIXED_CONTEXT if point.phase == "mixed" else point.tokens
        prompts_beside = PROMPTS_BESIDE if point.phase == "mixed" else 0
        self._all_ended = self._loop.create_future()
        self._left = point.batch_size + prompts_beside
        self._recorder.held = True
        for _ in range(point.batch_size):
            await self._add(context, num_tokens, dice)
        self._recorder.steps.clear()
        self._recorder.held = False
        async with asyncio.timeout(POINT_S):
            for _ in range(prompts_beside):
                await self._next_step()  # so that each prompt gets a step of its own
                await self._add(point.tokens, 1, dice)
            await self._all_ended
        return list(self._recorder.steps)

    async def _next_step(self) -> None:
        """Waits until the step thread has recorded a step."""
        recorded = asyncio.Event()
        self._recorder.on_step = lambda: self._loop.call_soon_threadsafe(recorded.set)
        await recorded.wait()
        self._recorder.on_step = lambda: None

    async def _add(self, num_prompt_tokens: int, num_tokens: int, dice: random.Random) -> None:
        vocabulary = self._engine.core.vllm_config.model_config.get_vocab_size()
        prompt = [dice.randrange(vocabulary) for _ in range(num_prompt_tokens)]
        await self._engine.add(self._payload(prompt, num_tokens), CLIENT)

    async def report_ms(self, send: Callable[[list[HeldRequest]], None]) -> tuple[int, float]:
        """Reports the requests as an instance does.

        Args:
            send: Encodes and sends a report; called on the step thread.

        Returns:
            Number of reported requests, and the time that the report took on the step thread, in ms.
        """
        began = 0.0

        def begin(held: HeldByClient) -> None:
            nonlocal began
            began = time.perf_counter()

        def visit(held: HeldByClient) -> tuple[int, float]:
            requests = held.get(CLIENT, [])
            send(requests)
            return len(requests), (time.perf_counter() - began) * 1e3

        # Both run at the same boundary between two steps: the second one alone is timed, from its begin on.
        _, result = await asyncio.gather(
            self._engine.visit_requests(begin), self._engine.visit_requests(visit)
        )
        return result

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

    def _take(self, client: str, outputs: "EngineCoreOutputs", spans: list[TokenSpan]) -> None:
        self._outputs.encode(outputs)  # as an instance does before it sends them
        self._left -= sum(output.finish_reason is not None for output in outputs.outputs)
        if not self._left:
            self._loop.call_soon_threadsafe(self._end)

    def _end(self, error: BaseException | None = None) -> None:
        if not self._all_ended.done():
            if error is None:
                self._all_ended.set_result(None)
            else:
                self._all_ended.set_exception(error)
