"""Requests with blocks in several cache groups: windows that pass, states, and what must not be left out."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import msgspec
import pytest
from vllm.v1.core.single_type_kv_cache_manager import MambaManager, RSWAManager
from vllm.v1.request import RequestStatus

from migration.messages import NO_BLOCK
from migration.vllm_engine.cache_groups import unsupported_group
from migration.vllm_engine.engine_load import read_load
from router.load import InstanceLoad
from tests.integration.scheduler_lab import (
    KINDS,
    Kind,
    Layers,
    Move,
    Node,
    migrate,
    nodes_at_rest,
    undisturbed,
)

pytestmark = pytest.mark.integration

BLOCK = 32
FULL, WINDOW = Layers(), Layers("window", window=BLOCK + 1)
STATE, STATES = Layers("state"), Layers("state", mode="align")
ENGINES = [(WINDOW,), (WINDOW, FULL), (FULL, STATE), (STATES, FULL, STATES)]
PROMPT = list(range(200, 265))  # two full blocks and a bit


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def make() -> Iterator[Callable[..., Node]]:
    with nodes_at_rest() as make:
        yield lambda kind, layers, **settings: make(
            kind, layers=layers, prefix_caching=STATE not in layers, **settings
        )


@pytest.mark.parametrize("layers", ENGINES)
def test_a_request_moves_to_and_fro_past_windows_and_block_ends(
    kind: Kind, layers: tuple[Layers, ...], make: Callable[..., Node]
) -> None:
    one, other = make(kind, layers), make(kind, layers)
    one.add("r", PROMPT, max_tokens=200)
    one.add("neighbour", PROMPT[:50], max_tokens=200)
    for tokens in range(1, 150, 17):
        here, there = (one, other) if one.stay_of("r") else (other, one)
        here.decode("r", tokens)
        migrate(here, there, "r", suspend=tokens % 2 == 0)
    for node in (one, other):
        node.run_to_the_end()
    assert one.streams["r"] == undisturbed(PROMPT, 200, layers)
    assert one.streams["neighbour"] == undisturbed(PROMPT[:50], 200, layers)


@pytest.mark.parametrize("layers", ENGINES)
def test_a_hand_off_begins_during_a_chunked_prefill(
    kind: Kind, layers: tuple[Layers, ...], make: Callable[..., Node]
) -> None:
    source, destination = (make(kind, layers, max_batched_tokens=2 * BLOCK) for _ in range(2))
    prompt = list(range(10 * BLOCK + 5))
    source.add("r", prompt, max_tokens=40)
    source.step()
    move = Move(source, destination, "r")
    move.finish()
    assert move.committed
    destination.run_to_the_end()
    assert source.streams["r"] == undisturbed(prompt, 40, layers)


@pytest.mark.parametrize("prompt_tokens", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("layers", ENGINES)
def test_short_prompts_and_those_that_end_with_a_block_move(
    kind: Kind, layers: tuple[Layers, ...], prompt_tokens: int, make: Callable[..., Node]
) -> None:
    source, destination = make(kind, layers), make(kind, layers)
    prompt = PROMPT[:prompt_tokens]
    source.add("r", prompt, max_tokens=70)
    source.step()
    migrate(source, destination, "r")
    destination.run_to_the_end()
    assert source.streams["r"] == undisturbed(prompt, 70, layers)


@pytest.mark.parametrize("layers", ENGINES)
def test_no_group_can_be_left_out(kind: Kind, layers: tuple[Layers, ...], make: Callable[..., Node]) -> None:
    """A negative control: were the copy of one group not needed, the other tests would show nothing."""
    for index in range(len(layers)):
        request_id = f"r{index}"
        source, destination = make(kind, layers), make(kind, layers)
        source.add(request_id, PROMPT, max_tokens=20)
        source.decode(request_id)
        move = Move(source, destination, request_id)
        move.left_out = (index,)
        move.finish()
        assert move.committed
        destination.run_to_the_end()
        assert source.streams[request_id] != undisturbed(PROMPT, 20, layers)


@pytest.mark.parametrize("confirmed_late", [False, True])
def test_blocks_that_left_the_window_during_the_copy_are_not_shared(
    kind: Kind, confirmed_late: bool, make: Callable[..., Node]
) -> None:
    """They are not at the source any more, so the blocks that were reserved for them hold anything."""
    source, destination = make(kind, (WINDOW,)), make(kind, (WINDOW,))
    source.add("r", PROMPT, max_tokens=300)
    source.decode("r")
    move = Move(source, destination, "r")
    move.advance()
    assert NO_BLOCK not in move.tables[0][1:]
    source.decode("r", 2 * BLOCK)
    destination.runner.memory.update({block: [7] * BLOCK for block in move.tables[0]})
    if confirmed_late:
        publish, destination.scheduler.publish = destination.scheduler.publish, lambda migration_id: None
    move.finish()
    assert move.committed
    if confirmed_late:
        destination.steps(3)
        destination.call(publish, move.migration_id)
    same = [*PROMPT[: 2 * BLOCK], 3, 4]
    destination.add("same", same, max_tokens=20)
    destination.run_to_the_end()
    assert source.streams["r"] == undisturbed(PROMPT, 300, (WINDOW,))
    assert source.streams["same"] == undisturbed(same, 20, (WINDOW,))


@pytest.mark.parametrize("tokens_meanwhile", [0, 2 * BLOCK])
def test_what_came_is_shared_however_far_the_window_has_passed(
    kind: Kind, tokens_meanwhile: int, make: Callable[..., Node]
) -> None:
    layers = (FULL, WINDOW, WINDOW)
    source, destination = make(kind, layers), make(kind, layers)
    source.add("r", PROMPT, max_tokens=300)
    source.decode("r")
    move = Move(source, destination, "r")
    move.advance()
    source.decode("r", 1 + tokens_meanwhile)
    move.finish()
    destination.run_to_the_end()
    again = destination.request("again", [*PROMPT, *source.streams["r"], 3], 5)
    _, num_hits, _ = destination.scheduler.kv_cache_manager.get_computed_blocks(again)
    assert num_hits == (len(PROMPT) + 299) // BLOCK * BLOCK


def test_blocks_that_a_copy_fills_are_not_zeroed_and_all_others_are(
    kind: Kind, make: Callable[..., Node]
) -> None:
    layers = (FULL, STATE)
    source, destination = make(kind, layers), make(kind, layers)
    source.add("r", PROMPT, max_tokens=20)
    source.decode("r")
    move = migrate(source, destination, "r")
    destination.step()
    assert destination.scheduled is not None
    assert destination.scheduled.new_block_ids_to_zero == move.tables[0][3:]
    destination.run_to_the_end()
    assert source.streams["r"] == undisturbed(PROMPT, 20, layers)


def test_blocks_of_an_arrival_that_ended_at_once_are_not_zeroed_under_the_next_one(
    kind: Kind, make: Callable[..., Node]
) -> None:
    """Both come between two steps of the destination, whose memory is just large enough for one."""
    layers = (FULL, STATE)
    source, destination = make(kind, layers), make(kind, layers, num_blocks=8)
    for request_id in ("gone", "r"):
        source.add(request_id, PROMPT, max_tokens=20)
        source.decode(request_id)
    migrate(source, destination, "gone")
    destination.call(
        destination.scheduler.finish_requests,
        destination.stay_of("gone"),
        RequestStatus.FINISHED_ABORTED,
    )
    migrate(source, destination, "r")
    destination.run_to_the_end()
    assert source.streams["r"] == undisturbed(PROMPT, 20, layers)


def test_what_the_prefix_cache_has_is_not_copied_but_for_states(
    kind: Kind, make: Callable[..., Node]
) -> None:
    layers = (STATES, FULL)
    source, destination = make(kind, layers), make(kind, layers)
    prompt = list(range(4 * BLOCK + 3))
    destination.add("earlier", prompt, max_tokens=3)
    destination.run_to_the_end()
    source.add("r", prompt, max_tokens=90)
    source.decode("r", 3)
    move = Move(source, destination, "r")
    move.advance()
    assert move.tokens_done == 4 * BLOCK
    assert move.tables[0] == []
    assert move.reserved is not None
    assert len(move.reserved.states) == 1
    move.finish()
    destination.run_to_the_end()
    assert source.streams["r"] == undisturbed(prompt, 90, layers)


def test_blocks_of_all_groups_count_in_the_load(kind: Kind, make: Callable[..., Node]) -> None:
    layers = (WINDOW, FULL, STATE)
    node = make(kind, layers, max_num_seqs=1)
    node.add("running", PROMPT, max_tokens=3)
    node.step()
    free = read_load(node.scheduler).free_blocks
    node.add("waiting", PROMPT, max_tokens=3)
    load = read_load(node.scheduler)
    assert (load.full_groups, load.window_groups, load.state_blocks) == (1, 1, 1)
    assert load.total_blocks - free == 3 + 3 + 1
    assert load.waiting_blocks == load.head_of_line_blocks == 7
    reported = InstanceLoad(instance_id="i", role="neutral", **msgspec.structs.asdict(load))
    assert reported.blocks_for(len(PROMPT)) == 7


def test_kinds_that_cannot_move_are_named() -> None:
    class Spec: ...

    odd = object.__new__(RSWAManager)
    odd.kv_cache_spec = Spec()
    assert unsupported_group(odd) == "a KV cache of kind Spec"
    states = object.__new__(MambaManager)
    vars(states).update(vars(SimpleNamespace(mamba_cache_mode="all", num_speculative_blocks=0)))
    assert "at every block" in str(unsupported_group(states))
    vars(states).update(mamba_cache_mode="none", num_speculative_blocks=2)
    assert unsupported_group(states) == "speculative decoding with linear attention"
    vars(states).update(num_speculative_blocks=0)
    assert unsupported_group(states) is None
