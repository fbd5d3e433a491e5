"""Random lives of requests on two schedulers: whatever happens, their tokens are as if nothing had."""

from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from migration.vllm_engine.request_loader import queue_for_recompute
from pd_serve.errors import SourceGoneError
from tests.integration.scheduler_lab import KINDS, Kind, Layers, Move, Node, undisturbed

pytestmark = pytest.mark.integration

BLOCK = 4
#: Blocks, slots and tokens per step are short now and then; one keeps blocks free at admission.
SIZES = [
    (44, {"max_num_seqs": 5, "max_batched_tokens": 14, "watermark": 0.1}),
    (32, {"max_num_seqs": 4, "max_batched_tokens": 64, "watermark": 0.0}),
]
FULL, WINDOW = Layers(block_tokens=BLOCK), Layers("window", BLOCK, window=10)
STATE = Layers("state", BLOCK, mode="align")
#: The cache groups of engines that people serve.
ENGINES = {
    "full": (FULL,),
    "window": (WINDOW,),
    "window and full": (WINDOW, FULL, WINDOW),
    "blocks of two sizes": (FULL, Layers("window", 2 * BLOCK, window=3)),
    "state": (Layers("state"),),
    "state and full": (FULL, Layers("state")),
    "states at block ends": (
        Layers("state", BLOCK, mode="align"),
        FULL,
        Layers("state", BLOCK, mode="align"),
    ),
}
#: One of them beside a local KV tier (`--kv-offloading-size`).
ENGINES["window and full, a tier"] = ENGINES["window and full"]
#: Requests share beginnings, so that the prefix caches hit.
PROMPTS = [[*range(beginning, beginning + 18), *range(30)] for beginning in (100, 200)]
#: What happens, as often as it is named here.
EVENTS = (
    ["step"] * 40
    + ["advance"] * 30
    + ["offer"] * 15
    + ["add"] * 5
    + ["cancel"] * 2
    + ["abort", "lose", "lose"]
)


class TwoNodes:
    """Does what it is told, as far as that is possible."""

    def __init__(
        self, kind: Kind, layers: tuple[Layers, ...], policy: str, prefix_caching: bool, offloading: bool
    ) -> None:
        self.streams: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        # vLLM keeps states at block ends for its prefix cache, and no other states with one.
        modes = {group.mode for group in layers if group.sees == "state"}
        prefix_caching = (prefix_caching and "none" not in modes) or "align" in modes
        settings = {
            "policy": policy,
            "prefix_caching": prefix_caching,
            "layers": layers,
            "offloading": offloading,
        }
        self.layers = layers
        self.nodes = [
            Node(
                kind,
                streams=self.streams,
                ended=self.ended,
                num_blocks=num_blocks * len(layers),
                **settings,
                **size,
            )
            for num_blocks, size in SIZES
        ]
        self.expected: dict[str, list[int]] = {}
        self.aborted: dict[str, int] = {}  # with the number of tokens that the client has seen
        self.moves: list[Move] = []

    def add(self, rng: Random) -> None:
        node, beginning = rng.choice(self.nodes), rng.choice(PROMPTS)
        for _ in range(rng.choice([1, 1, 2, 3])):
            request_id = f"r{len(self.expected)}"
            prompt, max_tokens = beginning[: rng.randint(1, 40)], rng.randint(1, 40)
            self.expected[request_id] = undisturbed(prompt, max_tokens, self.layers)
            node.add(request_id, prompt, max_tokens, priority=rng.randint(0, 2))

    def step(self, rng: Random) -> None:
        rng.choice(self.nodes).steps(rng.randint(1, 3))

    def offer(self, rng: Random) -> None:
        moving = {move.request_id for move in self.open_moves()}
        here = rng.randint(0, 1)
        names = self.nodes[here].names
        candidates = [r for r in self.nodes[here].scheduler.running if names[r.request_id] not in moving]
        if not candidates:
            return
        try:
            move = Move(self.nodes[here], self.nodes[1 - here], names[rng.choice(candidates).request_id])
        except SourceGoneError:
            return
        self.moves.append(move)
        for _ in range(rng.randint(1, 4)):
            move.advance()

    def advance(self, rng: Random) -> None:
        for move in self.open_moves():
            for _ in range(rng.randint(0, 3)):
                move.advance(suspend=rng.random() < 0.3)

    def cancel(self, rng: Random) -> None:
        if moves := self.open_moves():
            rng.choice(moves).cancel()

    def abort(self, rng: Random) -> None:
        if owned := self.owned():
            here, stay_id = rng.choice(owned)
            request_id = self.nodes[here].names[stay_id]
            self.aborted.setdefault(request_id, len(self.streams[request_id]))
            for node in self.nodes:
                stays = [stay for stay, name in node.names.items() if name == request_id]
                node.call(node.scheduler.finish_requests, stays, RequestStatus.FINISHED_ABORTED)
            for move in self.open_moves():
                if move.request_id == request_id and rng.random() < 0.5:  # else the destination hears late
                    move.cancel(resume=False)

    def lose(self, rng: Random) -> None:
        """A node recomputes a request from its client's tokens, perhaps the one that has it."""
        if not (owned := self.owned()):
            return
        here, stay_id = rng.choice(owned)
        node, heir = self.nodes[here], rng.choice(self.nodes)
        request_id = node.names[stay_id]
        for move in self.open_moves():
            if move.request_id == request_id:
                move.cancel()
        request = heir.copy_of(request_id, node.scheduler.requests[stay_id])
        node.call(node.scheduler.finish_requests, stay_id, RequestStatus.FINISHED_ABORTED)
        heir.call(queue_for_recompute, heir.scheduler, request)
        heir.runner.install(request)

    def owned(self) -> list[tuple[int, str]]:
        return [(index, stay) for index, node in enumerate(self.nodes) for stay in node.scheduler.requests]

    def open_moves(self) -> list[Move]:
        self.moves = [move for move in self.moves if not move.over]
        return self.moves

    def end(self) -> None:
        """Everything that is still there comes to its end, and is checked."""
        for move in self.open_moves():
            move.cancel()
        for node in self.nodes:
            node.run_to_the_end()
            assert node.problems() == []
        for request_id, expected in self.expected.items():
            seen = self.aborted.get(request_id, len(expected))
            assert self.streams[request_id][:seen] == expected[:seen], request_id
            assert request_id in self.aborted or request_id in self.ended, request_id


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(
    max_examples=max(10, settings().max_examples // 10),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes: do it by hand
    suppress_health_check=[*settings().suppress_health_check, HealthCheck.large_base_example],
)
@given(
    policy=st.sampled_from(["fcfs", "priority"]),
    prefix_caching=st.booleans(),
    events=st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 2**32)), min_size=100, max_size=300),
)
def test_random_operations_keep_the_output_and_all_blocks(
    kind: Kind, engine: str, policy: str, prefix_caching: bool, events: list[tuple[str, int]]
) -> None:
    two = TwoNodes(kind, ENGINES[engine], policy, prefix_caching, engine.endswith("tier"))
    for event, seed in events:
        getattr(two, event)(Random(seed))
    two.end()
