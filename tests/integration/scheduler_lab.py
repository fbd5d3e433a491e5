"""Real schedulers with a model runner that is played: its memory is a table from block to tokens.

The token that `PlayedRunner` samples depends on everything that the request's blocks hold, so a block
that is lost, stale, overwritten, read too early or put in the wrong place changes the output.
"""

import array
import copy
import itertools
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from migration.messages import NO_BLOCK, KvPart
from migration.reservation import Reservation
from migration.vllm_engine.migrating_scheduler import (
    MigratingAsyncScheduler,
    MigratingScheduler,
)
from migration.vllm_engine.migration_state import StageWaiter, Suspended
from migration.vllm_engine.scheduler_integrity import check_scheduler
from pd_serve.errors import DestinationRefusedError, SourceGoneError
from pd_serve.launch import engine_flags
from pd_serve.models import resolve
from tests.integration.played_tier import PlayedTier, offloading_config

VOCABULARY = 1000
_SEEN_NOTHING = -1


@dataclass(frozen=True)
class Kind:
    """One of the four ways in which an engine may schedule and run."""

    overlapped: bool
    v2: bool

    def __str__(self) -> str:
        return f"{'async' if self.overlapped else 'sync'}-{'v2' if self.v2 else 'v1'}"


KINDS = [Kind(overlapped, v2) for overlapped in (False, True) for v2 in (False, True)]


@dataclass(frozen=True)
class Layers:
    """A cache group of the played model: what its layers see of the tokens before the next one.

    Attributes:
        sees: "all" of them, the last `window` ones, or a "state" that every token changes.
        mode: How states are kept: "none", one for a request; "align", one at the end of each block, too.
    """

    sees: str = "all"
    block_tokens: int = 32
    window: int = 0
    mode: str = "none"

    def seen(self, entries: list[int]) -> list[int]:
        """What a token after these is sampled from."""
        if self.sees == "state":
            return [state_after(0, entries)]
        return entries[-self.window :] if self.sees == "window" else entries

    def spec(self, max_model_len: int) -> Any:
        sizes: dict[str, Any] = {"num_kv_heads": 1, "head_size": 16, "dtype": torch.float32}
        if self.sees == "all":
            return FullAttentionSpec(block_size=self.block_tokens, **sizes)
        if self.sees == "window":
            return SlidingWindowSpec(block_size=self.block_tokens, sliding_window=self.window, **sizes)
        size = self.block_tokens if self.mode == "align" else max_model_len
        shapes, dtypes = ((16,),), (torch.float32,)
        return MambaSpec(block_size=size, shapes=shapes, dtypes=dtypes, mamba_cache_mode=self.mode)


#: Plain attention.
FULL = (Layers(),)


def state_after(state: int, entries: list[int]) -> int:
    """What a state becomes when these tokens are computed."""
    for value in entries:
        state = zlib.crc32(array.array("q", [state, value]).tobytes())
    return state


def sample(contents: list[int]) -> int:
    """The next token, by what all layers see."""
    return zlib.crc32(array.array("q", contents).tobytes()) % VOCABULARY


def entry(position: int, token: int) -> int:
    """What stands for the KV of a token at a position."""
    return position * VOCABULARY + token


def undisturbed(prompt: list[int], num_tokens: int, layers: tuple[Layers, ...] = FULL) -> list[int]:
    """The output of a request that nothing happens to."""
    entries = [entry(position, token) for position, token in enumerate(prompt)]
    output: list[int] = []
    for _ in range(num_tokens):
        output.append(sample([value for group in layers for value in group.seen(entries)]))
        entries.append(entry(len(entries), output[-1]))
    return output


# ---- the played runner


@dataclass(eq=False)
class WorkerRequest:
    """What a model runner keeps of a request.

    Attributes:
        tokens: Prompt and outputs as far as they are known.
        pending: Tokens that steps in flight are going to sample.
    """

    num_prompt_tokens: int
    tokens: list[int]
    block_ids: list[list[int]]
    pending: int = 0


@dataclass(frozen=True)
class Job:
    """A request's part of a step."""

    request_id: str
    state: WorkerRequest
    start: int
    end: int
    block_ids: list[list[int]]
    samples: bool


@dataclass
class PlayedRunner:
    """vLLM's model runner, as far as the scheduler can tell.

    Like the real ones it takes the scheduler's word when a step is dispatched, and reads and writes blocks
    some time later: in `complete`. It checks what a real one relies on.

    Source: `_update_states` in vllm/v1/worker/gpu_model_runner.py; model_runner.py and states.py in
    vllm/v1/worker/gpu.
    """

    kind: Kind
    layers: tuple[Layers, ...]
    num_slots: int
    memory: dict[int, list[int]] = field(default_factory=dict)
    requests: dict[str, WorkerRequest] = field(default_factory=dict)
    last_batch: set[str] = field(default_factory=set)
    tier: PlayedTier | None = None

    def install(self, request: Request) -> None:
        """What `worker.install_request` does to a V1 runner."""
        if not self.kind.v2:
            tokens = list(request.all_token_ids)
            self.requests[request.request_id] = WorkerRequest(
                request.num_prompt_tokens, tokens, [[] for _ in self.layers]
            )

    def dispatch(self, output: SchedulerOutput) -> list[Job]:
        self.memory.update({block: [] for block in output.new_block_ids_to_zero or ()})
        for request_id in output.finished_req_ids | (output.preempted_req_ids if self.kind.v2 else set()):
            self.requests.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            if self.kind.v2:
                tokens = list(new.prefill_token_ids)
                self.requests.pop(new.req_id, None)
            else:
                tokens = list(new.prompt_token_ids)
                assert new.req_id not in self.requests, "a V1 runner takes it for a streaming update"
            num_prompt_tokens = len(new.prompt_token_ids)
            self.requests[new.req_id] = WorkerRequest(
                num_prompt_tokens, tokens, list(map(list, new.block_ids))
            )
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            starts[request_id] = cached.num_computed_tokens[index]
            self._update(cached, index)
        assert set(starts) == set(output.num_scheduled_tokens)
        self.last_batch = set(starts)
        in_slots = self.requests if self.kind.v2 else self.last_batch
        assert len(in_slots) <= self.num_slots, "the runner has no slot left"
        return [self._job(rid, starts[rid], count) for rid, count in output.num_scheduled_tokens.items()]

    def _update(self, cached: Any, index: int) -> None:
        request_id = cached.req_ids[index]
        state = self.requests[request_id]
        new_block_ids = cached.new_block_ids[index]
        if request_id in cached.resumed_req_ids:
            assert not self.kind.v2
            assert request_id not in self.last_batch
            state.block_ids = list(map(list, new_block_ids))
        elif new_block_ids is not None:
            pairs = zip(state.block_ids, new_block_ids, strict=True)
            state.block_ids = [known + new for known, new in pairs]
        if self.kind.v2 or request_id in self.last_batch:
            return
        # The token of a step in flight is taken from the last batch only.
        assert not state.pending, "a V1 runner reads the token in flight from the wrong place"
        known = cached.all_token_ids[request_id]
        assert len(known) == state.num_prompt_tokens + cached.num_output_tokens[index]
        if self.kind.overlapped:
            state.tokens = list(known)
        else:
            assert state.tokens == known

    def _job(self, request_id: str, start: int, count: int) -> Job:
        state = self.requests[request_id]
        end, num_known = start + count, len(state.tokens) + state.pending
        assert end <= num_known, "tokens are scheduled that do not exist"
        for layers, ids in zip(self.layers, state.block_ids, strict=True):
            if layers.sees != "state":
                assert len(ids) * layers.block_tokens >= end, "tokens are scheduled that have no slots"
        samples = end == num_known
        state.pending += samples
        return Job(request_id, state, start, end, list(map(list, state.block_ids)), samples)

    def complete(self, jobs: list[Job], metadata: Any = None) -> ModelRunnerOutput:
        if self.tier is not None:
            self.tier.before_forward(metadata)
        for job in jobs:
            entries = [entry(position, job.state.tokens[position]) for position in range(job.start, job.end)]
            for layers, block_ids in zip(self.layers, job.block_ids, strict=True):
                self._write(layers, block_ids, job.start, entries)
        sampled: list[list[int]] = []
        for job in jobs:
            if not job.samples:
                sampled.append([])
                continue
            groups = zip(self.layers, job.block_ids, strict=True)
            sampled.append([sample([v for layers, ids in groups for v in self._read(layers, ids, job.end)])])
            job.state.tokens.extend(sampled[-1])
            job.state.pending -= 1
        ids = [job.request_id for job in jobs]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            kv_connector_output=self.tier and self.tier.after_forward(metadata),
        )

    def _write(self, layers: Layers, block_ids: list[int], start: int, entries: list[int]) -> None:
        if layers.sees == "state":
            before = self._read(layers, block_ids, start)[0] if start else 0
            place = self._state_place(layers, start + len(entries))
            self.memory[block_ids[place]] = [state_after(before, entries)]
            return
        for position, value in enumerate(entries, start):
            block = block_ids[position // layers.block_tokens]
            assert block, "a token is computed into the null block"
            slots = self.memory.setdefault(block, [])
            slots.extend([_SEEN_NOTHING] * (layers.block_tokens - len(slots)))
            slots[position % layers.block_tokens] = value

    def _read(self, layers: Layers, block_ids: list[int], end: int) -> list[int]:
        """What the layers see of the first `end` tokens."""
        if layers.sees == "state":
            block = block_ids[self._state_place(layers, end)]
            assert block, "the state is in the null block"
            return self.memory.get(block, [_SEEN_NOTHING])[:1]
        begin = max(0, end - layers.window) if layers.sees == "window" else 0
        size, seen = layers.block_tokens, []
        for position in range(begin, end):
            slots = self.memory.get(block_ids[position // size], [])
            seen.append(slots[position % size] if position % size < len(slots) else _SEEN_NOTHING)
        return seen

    def _state_place(self, layers: Layers, num_tokens: int) -> int:
        return (num_tokens - 1) // layers.block_tokens if layers.mode == "align" else 0

    def copy_blocks_from(self, peer: "PlayedRunner", pairs: list[tuple[int, int]]) -> None:
        """The transport: what the blocks hold now, whoever is still writing to them."""
        for theirs, ours in pairs:
            assert theirs > 0, "the null block"
            assert ours > 0, "the null block"
            self.memory[ours] = list(peer.memory.get(theirs, [_SEEN_NOTHING]))


# ---- an engine without a model


@cache
def _vllm_config() -> tuple[Any, StructuredOutputManager]:
    flags = {
        "model": resolve("tiny"),
        "dtype": "float32",
        "block_size": 32,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "skip_tokenizer_init": True,
    }
    init_none_hash(sha256)
    config = engine_flags.parse([], flags).engine_config("neutral")
    return config, StructuredOutputManager(config)


class Node:
    """One scheduler with its played runner, stepped as vLLM's `EngineCore` steps them.

    Overlapped, a step is scheduled before the output of the one before it is looked at, and between two
    steps one is in flight. Source: vllm/v1/engine/core.py, `step` and `step_with_batch_queue`.

    Attributes:
        streams: Output tokens by request, whoever emitted them; may be shared between nodes.
        names: Requests by the id of each of their stays here. The first stay has the request's own id.
        ended: Why requests have ended.
    """

    def __init__(
        self,
        kind: Kind,
        *,
        num_blocks: int = 100,
        layers: tuple[Layers, ...] = FULL,
        max_num_seqs: int = 8,
        max_batched_tokens: int = 2048,
        policy: str = "fcfs",
        prefix_caching: bool = True,
        watermark: float = 0.0,
        offloading: bool = False,
        streams: dict[str, list[int]] | None = None,
        ended: dict[str, str] | None = None,
    ) -> None:
        shared, structured_output_manager = _vllm_config()
        config = copy.copy(shared)
        config.scheduler_config = copy.copy(shared.scheduler_config)
        config.cache_config = copy.copy(shared.cache_config)
        config.scheduler_config.async_scheduling = kind.overlapped
        config.scheduler_config.max_num_seqs = max_num_seqs
        config.scheduler_config.max_num_batched_tokens = max_batched_tokens
        config.scheduler_config.policy = policy
        config.scheduler_config.watermark = watermark
        config.cache_config.enable_prefix_caching = prefix_caching
        config.cache_config.num_gpu_blocks = num_blocks
        config.kv_transfer_config = offloading_config() if offloading else None
        config.cache_config.mamba_cache_mode = "align" if any(g.mode == "align" for g in layers) else "none"
        specs = [group.spec(config.model_config.max_model_len) for group in layers]
        block_tokens = config.cache_config.block_size = math.lcm(*(spec.block_size for spec in specs))
        hash_tokens = math.gcd(*(spec.block_size for spec in specs))
        groups = [KVCacheGroupSpec([f"layer {index}"], spec) for index, spec in enumerate(specs)]
        cls = MigratingAsyncScheduler if kind.overlapped else MigratingScheduler
        self.scheduler = cls(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks, [], groups),
            structured_output_manager=structured_output_manager,
            block_size=block_tokens,
            hash_block_size=hash_tokens,
            log_stats=True,
        )
        self.scheduler.use_v2_model_runner = kind.v2
        self.runner = PlayedRunner(kind, layers, max_num_seqs)
        if offloading:
            self.runner.tier = PlayedTier(self.runner.memory)
        self.kind = kind
        self.streams = {} if streams is None else streams
        self.names: dict[str, str] = {}
        self.ended = {} if ended is None else ended
        self.scheduled: SchedulerOutput | None = None  # by the last step
        self._hasher = get_request_block_hasher(hash_tokens, sha256) if prefix_caching or offloading else None
        self._in_flight: deque[tuple[SchedulerOutput, list[Job]]] = deque()

    # -- requests

    def request(
        self, request_id: str, prompt: list[int], max_tokens: int, priority: int = 0, arrived_at: float = 0.0
    ) -> Request:
        stay_id = f"{request_id}@{len(self.names)}" if request_id in self.names else request_id
        self.names[stay_id] = request_id
        return Request(
            stay_id,
            list(prompt),
            SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0),
            None,
            arrival_time=arrived_at,
            priority=priority,
            block_hasher=self._hasher,
        )

    def copy_of(self, request_id: str, request: Request) -> Request:
        """A request as it arrives here: from its payload, with its tokens so far."""
        assert request.prompt_token_ids is not None
        arriving = self.request(
            request_id,
            request.prompt_token_ids,
            request.max_tokens,
            request.priority,
            request.arrival_time,
        )
        arriving.append_output_token_ids(list(request.output_token_ids))
        return arriving

    def stay_of(self, request_id: str) -> str | None:
        """The id of a request's stay here; None if it is not here."""
        return next((stay for stay in self.scheduler.requests if self.names[stay] == request_id), None)

    def add(self, request_id: str, prompt: list[int], max_tokens: int = 1000, priority: int = 0) -> Request:
        request = self.request(request_id, prompt, max_tokens, priority, arrived_at=len(self.streams))
        self.streams[request_id] = []
        self.scheduler.add_request(request)
        return request

    # -- stepping

    def step(self) -> None:
        """One call of the engine's step function, and the boundary after it."""
        scheduler = self.scheduler
        self.scheduled = None
        if scheduler.has_requests():
            output = self.scheduled = scheduler.schedule()
            self._in_flight.append((output, self.runner.dispatch(output)))
            self._check_slots()
            self._check_entered(output)
            executed = output.total_num_scheduled_tokens > 0
            full = len(self._in_flight) == (2 if self.kind.overlapped else 1)
            if not full and (executed or scheduler.has_requests()):
                self.settle()
                return
        if self._in_flight:
            self._process()
        self.settle()

    def settle(self) -> None:
        self.scheduler.settle_stages()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def run_until(self, condition: Any, limit: int = 500) -> None:
        for _ in range(limit):
            if condition():
                return
            self.step()
        raise AssertionError(f"did not happen in {limit} steps")

    def decode(self, request_id: str, num_tokens: int = 1) -> None:
        """Steps until a request has this many output tokens."""
        self.run_until(lambda: len(self.streams[request_id]) >= num_tokens)

    def run_to_the_end(self, limit: int = 5000) -> None:
        """Until nothing is left to do, in flight included."""
        self.run_until(lambda: not (self.scheduler.has_requests() or self._in_flight), limit)

    def _process(self) -> None:
        output, jobs = self._in_flight.popleft()
        done = self.runner.complete(jobs, output.kv_connector_metadata)
        results = self.scheduler.update_from_output(output, done)
        for result in (o for batch in results.values() for o in batch.outputs):
            request_id = self.names[result.request_id]
            self.streams[request_id].extend(result.new_token_ids)
            if result.finish_reason is not None:
                assert request_id not in self.ended, "ended twice"
                self.ended[request_id] = str(result.finish_reason)

    def _check_slots(self) -> None:
        state = self.scheduler.migration
        held = len(self.scheduler.running) + len(state.suspended) + len(state.arriving)
        assert held <= self.scheduler.max_num_running_reqs

    def _check_entered(self, output: SchedulerOutput) -> None:
        """A request that has come with its blocks is in the very next batch, unless one had to leave it."""
        if self.runner.tier and self.scheduler.policy is SchedulingPolicy.PRIORITY:
            return  # one of higher priority whose blocks have come from the tier may enter before it
        arrived = self.scheduler.migration.arrived
        holding = self.scheduler.kv_holding_waiting  # some of them wait for the tier
        waiting = [r.request_id for r in holding if r.request_id in arrived and not r.num_preemptions]
        assert not waiting or output.preempted_req_ids, f"{waiting} wait for admission with their blocks held"

    # -- migration, as `VllmEngine` does it

    def wait_for_stage(
        self,
        request: Request,
        tokens_done: int = 0,
        *,
        suspend: bool = False,
        incarnation: int | None = None,
        reader: str = "",
    ) -> "Answer":
        """Without a reader, nothing is pinned for longer than the call."""
        answer = Answer()

        def take(item: KvPart | Suspended | SourceGoneError) -> None:
            answer.append(item)
            if not reader:
                self.scheduler.migrated_blocks.unpin(reader)

        incarnation = request.num_preemptions if incarnation is None else incarnation
        self.scheduler.wait_for_stage(
            StageWaiter(request.request_id, incarnation, tokens_done, suspend, reader, take)
        )
        self.settle()  # as after every call
        return answer

    def commit(self, migration_id: str, final: Suspended) -> Request:
        arriving = self.scheduler.migration.arriving[migration_id]
        arriving.append_output_token_ids(list(final.request.output_token_ids)[arriving.num_output_tokens :])
        request = self.scheduler.commit(migration_id, final.request.num_computed_tokens)
        self.runner.install(request)
        self.settle()
        return request

    def call(self, function: Any, *arguments: Any) -> Any:
        """A call from the event loop, between two steps."""
        try:
            return function(*arguments)
        finally:
            self.settle()

    def block_ids(self, request_id: str) -> list[int]:
        return list(self.scheduler.kv_cache_manager.get_block_ids(request_id)[0])

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def problems(self) -> list[str]:
        """What a node at rest should not show."""
        problems = check_scheduler(self.scheduler)
        usable = self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
        if self.free_blocks != usable:
            problems.append(f"{usable - self.free_blocks} blocks are not free")
        for name in ("requests", "running"):
            if getattr(self.scheduler, name):
                problems.append(f"{name} is not empty")
        state = self.scheduler.migration
        problems += [f"{name} is not empty: {table}" for name, table in vars(state).items() if table]
        if self.runner.requests:
            problems.append(f"the runner keeps {sorted(self.runner.requests)}")
        return problems


@contextmanager
def nodes_at_rest() -> Iterator[Callable[..., Node]]:
    """Makes nodes that share their clients, and wants them at rest in the end."""
    nodes: list[Node] = []
    streams: dict[str, list[int]] = {}
    ended: dict[str, str] = {}

    def make(kind: Kind, **settings: Any) -> Node:
        nodes.append(Node(kind, streams=streams, ended=ended, **settings))
        return nodes[-1]

    yield make
    for node in nodes:
        node.run_to_the_end()
        assert node.problems() == []


class Answer(list[KvPart | Suspended | SourceGoneError]):
    """What a `StageWaiter` was told: empty, or one item."""

    @property
    def part(self) -> KvPart:
        (answer,) = self
        assert isinstance(answer, KvPart)
        return answer

    @property
    def final(self) -> Suspended:
        (answer,) = self
        assert isinstance(answer, Suspended)
        return answer

    @property
    def gone(self) -> bool:
        (answer,) = self or [None]
        return isinstance(answer, SourceGoneError)


class Move:
    """A migration, one message at a time: `advance` makes the next move that is possible now.

    It refuses, retreats and withdraws as the protocol does, so after `over` both sides are as they should be.
    """

    _serial = itertools.count()

    def __init__(self, source: Node, destination: Node, request_id: str) -> None:
        self.source, self.destination = source, destination
        self.migration_id = f"m{next(self._serial)}"
        self.request = source.scheduler.running_request(source.stay_of(request_id))
        self.incarnation = self.request.num_preemptions
        self.reserved: Reservation | None = None
        self.tables: list[list[int]] = []
        self.tokens_done = 0
        #: Cache groups that are left out of the copy, to see that it is needed.
        self.left_out: tuple[int, ...] = ()
        self.stages = 0
        self.answer: Answer | None = None
        self.final: Suspended | None = None
        self.over = False
        self.committed = False
        self.why = ""

    @property
    def request_id(self) -> str:
        """The request's, wherever it is."""
        return self.source.names[self.request.request_id]

    @property
    def stay_id(self) -> str:
        """Of the request at its source."""
        return self.request.request_id

    def advance(self, *, suspend: bool = False) -> None:
        if self.over:
            return
        try:
            if self.committed:
                self.destination.call(self.destination.scheduler.publish, self.migration_id)
                self.over = True
            elif self.reserved is None:
                self._reserve()
            elif self.answer is None:
                self.answer = self.source.wait_for_stage(
                    self.request,
                    self.tokens_done,
                    suspend=suspend,
                    incarnation=self.incarnation,
                    reader=self.migration_id,
                )
            elif self.answer:
                self._take(self.answer[0])
        except DestinationRefusedError as error:
            self.cancel(str(error))

    def _reserve(self) -> None:
        arriving = self.destination.copy_of(self.request_id, self.request)
        scheduler = self.destination.scheduler
        self.reserved = self.destination.call(scheduler.reserve, self.migration_id, arriving)
        self.tables, self.tokens_done = self.reserved.tables, self.reserved.tokens_present

    def _take(self, answer: KvPart | Suspended | SourceGoneError) -> None:
        if isinstance(answer, SourceGoneError):
            self.cancel(str(answer), resume=False)
            return
        part = answer if isinstance(answer, KvPart) else answer.tail
        if any(run.end > len(table) for run, table in zip(part.runs, self.tables, strict=True)):
            scheduler = self.destination.scheduler
            self.tables = self.destination.call(scheduler.grow, self.migration_id, part.end)
        self.destination.runner.copy_blocks_from(self.source.runner, self.block_pairs(part))
        self.tokens_done, self.stages, self.answer = part.end, self.stages + 1, None
        if isinstance(answer, Suspended):
            self.destination.commit(self.migration_id, answer)
            if self.source.call(self.source.scheduler.release, self.stay_id):
                self.source.scheduler.migrated_blocks.unpin(self.migration_id)
                self.committed = True
            else:
                self.cancel("it ended at its source before the commit", resume=False)

    def block_pairs(self, part: KvPart) -> list[tuple[int, int]]:
        assert self.reserved is not None
        groups = enumerate(zip(part.runs, self.tables, strict=True))
        pairs = [
            pair
            for index, (run, table) in groups
            if index not in self.left_out
            for pair in zip(run.block_ids, table[run.first : run.end], strict=True)
            if NO_BLOCK not in pair
        ]
        with_state = [index for index, group in enumerate(self.source.runner.layers) if group.sees == "state"]
        states = zip(with_state, part.states, self.reserved.states, strict=False)
        return pairs + [(theirs, ours) for index, theirs, ours in states if index not in self.left_out]

    def cancel(self, why: str = "cancelled", *, resume: bool = True) -> None:
        """The request stays where it is; the destination forgets it. After the commit: no confirmation."""
        if self.over:
            return
        self.over, self.why = True, why
        if self.committed:
            return
        self.destination.call(self.destination.scheduler.drop, self.migration_id)
        self.source.scheduler.migrated_blocks.unpin(self.migration_id)
        if resume:
            self.source.call(self.source.scheduler.resume, self.stay_id)

    def finish(self, *, suspend: bool = False, limit: int = 200, step_destination: bool = False) -> None:
        """Moves on, the source decoding meanwhile, until it is over."""
        for _ in range(limit):
            self.advance(suspend=suspend)
            if self.over:
                return
            if self.answer is not None and not self.answer:
                self.source.step()
                if step_destination:
                    self.destination.step()
        raise AssertionError(f"not over after {limit} moves")


def migrate(source: Node, destination: Node, request_id: str, *, suspend: bool = False) -> Move:
    """Moves a request, and insists that it works."""
    move = Move(source, destination, request_id)
    move.finish(suspend=suspend)
    assert move.committed, move.why
    return move
