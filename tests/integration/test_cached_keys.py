"""What vLLM's prefix cache gains and loses, and the keys of requests in API servers."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from migration.cached_keys import key_of
from migration.vllm_engine.cached_keys import CachedKeys, RecordedKeys
from pd_serve.api.prefix_keys import PrefixKeys
from tests.integration.scheduler_lab import Kind, Layers, Node, migrate, nodes_at_rest

pytestmark = pytest.mark.integration

BLOCK = 32
FULL = Layers()
#: Layers of an engine, and the group whose keys are told.
ENGINES = [
    ((FULL,), 0),
    ((Layers("window", window=BLOCK + 1), FULL), 1),
    ((Layers("window", window=BLOCK + 1),), 0),
    ((Layers("window", window=BLOCK + 1), Layers(block_tokens=2 * BLOCK)), 1),
]


@pytest.fixture
def make() -> Iterator[Callable[..., Node]]:
    with nodes_at_rest() as make:
        yield lambda **settings: make(Kind(overlapped=False, v2=True), **settings)


class Follower:
    """Takes the changes of a node's prefix cache, a few at a time."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.keys = CachedKeys(node.scheduler.vllm_config, node.scheduler)
        self.known: set[int] = set()
        self.starts = 0

    def look(self) -> set[int]:
        while self.keys.has_changed:
            gained, lost, anew = self.keys.take(3)
            if anew:
                self.known.clear()
                self.starts += 1
            self.known.update(map(key_of, gained))
            self.known.difference_update(map(key_of, lost))
        return self.known


def present(node: Node, group: int) -> set[int]:
    """The keys of the blocks in a group of vLLM's prefix cache."""
    pool: Any = node.scheduler.kv_cache_manager.block_pool
    found = pool.cached_block_hash_to_block._cache
    return {key_of(value) for value in found if kv_cache_utils.get_group_id(value) == group}


def engine_request(request_id: str, prompt: list[int], **details: Any) -> EngineCoreRequest:
    values: dict[str, Any] = dict.fromkeys(
        ("mm_features", "pooling_params", "lora_request", "cache_salt", "data_parallel_rank")
    )
    parameters = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0.0)
    values |= {"sampling_params": parameters, "arrival_time": 0.0} | details
    return EngineCoreRequest(request_id=request_id, prompt_token_ids=prompt, **values)


@pytest.mark.parametrize(("layers", "group"), ENGINES)
def test_a_follower_knows_the_blocks_of_the_prefix_cache(
    layers: tuple[Layers, ...], group: int, make: Callable[..., Node]
) -> None:
    """With evictions, blocks of equal contents, preemptions and resets of the cache."""
    dice = random.Random(str(layers))
    node = make(layers=layers, num_blocks=40)
    node.add("before", list(range(200)), max_tokens=3)
    node.run_to_the_end()
    follower = Follower(node)
    assert follower.look() == present(node, group) != set()
    lost = 0
    for number in range(60):
        same = [dice.randrange(3)] * dice.randrange(1, 300)
        node.add(str(number), same + [dice.randrange(1000) for _ in range(dice.randrange(60))], max_tokens=40)
        node.steps(dice.randrange(30))
        if dice.random() < 0.1:
            node.run_to_the_end()
            assert node.scheduler.reset_prefix_cache()
        before = set(follower.known)
        assert follower.look() == present(node, group)
        lost += len(before - follower.known)
    assert lost > 20
    assert follower.starts > 3


def test_blocks_that_came_are_told_once_they_are_confirmed(
    make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = make(), make()
    follower = Follower(there)
    follower.look()
    here.add("r", list(range(100)), max_tokens=50)
    here.decode("r", 2)
    confirmed: list[str] = []
    publish = there.scheduler.publish
    monkeypatch.setattr(there.scheduler, "publish", confirmed.append)
    migrate(here, there, "r")
    there.decode("r", 40)
    assert not follower.look()
    publish(*confirmed)

    assert len(follower.look()) >= 4
    assert follower.look() == present(there, 0)


REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "salted": {"cache_salt": "mine"},
    "adapter": {"lora_request": LoRARequest("french@/adapters/french", 7, "/adapters/french")},
    "image": {
        "mm_features": [
            MultiModalFeatureSpec(None, "image", "picture", PlaceholderRange(offset=40, length=20), "picture")
        ]
    },
}


@pytest.mark.parametrize(("layers", "group"), ENGINES)
def test_an_api_server_computes_the_keys_that_the_engine_has(
    layers: tuple[Layers, ...], group: int, make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [number % 7 for number in range(7 * BLOCK + 5)]
    node = make(layers=layers)
    follower = Follower(node)
    assert follower.keys.format is not None
    size = follower.keys.format.key_tokens
    expected, requests = {}, {}
    for name, details in REQUESTS.items():
        request = engine_request(name, prompt, **details)
        expected[name] = [key_of(h) for h in node._hasher(Request.from_engine_core_request(request, None))]  # type: ignore[misc]
        requests[name] = request
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", b"of another process")
    keys = {name: PrefixKeys().of(request, follower.keys.format) for name, request in requests.items()}

    for name, found in keys.items():
        assert list(found) == expected[name][size // BLOCK - 1 :: size // BLOCK]
        assert len(found) == len(prompt) // size
    assert len({found[0] for found in keys.values()} | {found[1] for found in keys.values()}) >= 5
    node.add("r", prompt, max_tokens=2)
    node.run_to_the_end()
    assert len(follower.look() & set(keys["plain"])) >= min(len(keys["plain"]), 2)


def test_requests_that_read_no_prefix_cache_have_no_keys(make: Callable[..., Node]) -> None:
    key_format = Follower(make()).keys.format
    prompt = list(range(100))
    parameters = SamplingParams(max_tokens=2, prompt_logprobs=1)

    assert len(PrefixKeys().of(engine_request("r", prompt), key_format)) == 3
    assert PrefixKeys().of(engine_request("r", prompt, sampling_params=parameters), key_format) == ()
    assert PrefixKeys().of(engine_request("r", prompt), None) == ()


def test_an_engine_tells_nothing_without_a_prefix_cache_or_with_keys_of_its_own(
    make: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Follower(make(prefix_caching=False)).keys.format is None
    assert not Follower(make(prefix_caching=False)).keys.has_changed
    node = make()
    monkeypatch.setattr(node.scheduler.vllm_config.cache_config, "prefix_caching_hash_algo", "xxhash")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert Follower(node).keys.format is None
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert Follower(node).keys.format is not None


async def test_the_changes_are_taken_between_two_steps_and_only_if_there_are_any(
    make: Callable[..., Node],
) -> None:
    class Steps:
        calls = 0

        async def call(self, function: Callable[[], Any]) -> Any:
            self.calls += 1
            return function()

    node, steps = make(), Steps()
    keys = RecordedKeys(Follower(node).keys, steps)  # type: ignore[arg-type]
    assert await keys.take(10) == ([], [], True)
    assert await keys.take(10) is None
    node.add("r", list(range(100)), max_tokens=2)
    node.run_to_the_end()
    changes = await keys.take(10)

    assert changes is not None
    assert set(changes.gained) == present(node, 0)
    assert steps.calls == 2
