"""What an engine says of its load, read from vLLM's own scheduler at every turn of its requests' lives."""

import pytest

from migration.vllm_engine.engine_load import read_load
from router.load import EngineLoad
from tests.integration.scheduler_lab import KINDS, Kind, Move, Node

pytestmark = pytest.mark.integration

BLOCK = 32


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


def load_of(node: Node) -> EngineLoad:
    return read_load(node.scheduler)


def prompt(blocks: int, first: int = 0) -> list[int]:
    """As many tokens as fill blocks that no other prompt shares."""
    return list(range(first * 1000, first * 1000 + blocks * BLOCK))


def make(kind: Kind, **settings: object) -> Node:
    return Node(kind, **({"streams": {}, "ended": {}} | settings))


def test_an_idle_engine_has_no_load(kind: Kind) -> None:
    node = make(kind, num_blocks=21)
    expected = EngineLoad(total_blocks=20, free_blocks=20, block_tokens=BLOCK, step_prompt_tokens=2048)
    assert load_of(node) == expected


def test_waiting_requests_count_with_the_blocks_they_need(kind: Kind) -> None:
    node = make(kind, num_blocks=21, max_num_seqs=1)
    node.add("a", prompt(3, 0), max_tokens=5)
    node.add("b", prompt(4, 1), max_tokens=5)
    node.add("c", prompt(6, 2), max_tokens=5)
    load = load_of(node)
    assert (load.waiting, load.head_of_line_blocks, load.waiting_blocks) == (3, 3, 13)
    assert load.waiting_tokens == 13 * BLOCK
    node.run_until(lambda: len(node.streams["a"]) == 3)
    load = load_of(node)
    assert (load.running, load.waiting, load.head_of_line_blocks, load.waiting_blocks) == (1, 2, 4, 10)
    assert load.waiting_tokens == 10 * BLOCK
    assert load.free_blocks == 20 - 4
    node.run_to_the_end()
    assert load_of(node).free_blocks == 20


def test_the_head_of_the_line_is_the_most_urgent(kind: Kind) -> None:
    node = make(kind, policy="priority", max_num_seqs=1)
    node.add("running", prompt(1, 0), max_tokens=20)
    node.run_until(lambda: node.streams["running"])
    node.add("normal", prompt(2, 1), max_tokens=5)
    node.add("urgent", prompt(5, 2), max_tokens=5, priority=-1)
    load = load_of(node)
    assert (load.head_of_line_blocks, load.waiting_blocks, load.high_priority) == (5, 7, 0)
    node.run_until(lambda: node.streams["urgent"])
    assert load_of(node).high_priority == 1
    node.run_to_the_end()


def test_a_report_leaves_the_priority_queue_unsorted(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    node = make(kind, policy="priority")
    for number in range(5):
        node.add(f"r{number}", prompt(number + 1, number), max_tokens=5, priority=-number)
    with monkeypatch.context() as patched:
        patched.setattr("heapq.heappop", lambda heap: pytest.fail("a report sorts the queue"))
        load = load_of(node)
    assert (load.waiting, load.waiting_blocks, load.head_of_line_blocks) == (5, 15, 5)
    node.run_to_the_end()


def test_preempted_requests_are_those_that_wait_again(kind: Kind) -> None:
    node = make(kind, num_blocks=11)
    for number, name in enumerate("ab"):
        node.add(name, prompt(4, number), max_tokens=3 * BLOCK)
    node.run_until(lambda: load_of(node).preempted)
    load = load_of(node)
    assert (load.preempted, load.running, load.waiting) == (1, 1, 1)
    assert load.head_of_line_blocks > 4  # its output comes back with it
    node.run_to_the_end()
    assert load_of(node).preempted == 0


def test_a_moving_request_counts_on_both_sides(kind: Kind) -> None:
    streams: dict[str, list[int]] = {}
    source, destination = (make(kind, streams=streams) for _ in range(2))
    source.add("r", prompt(3), max_tokens=30)
    source.run_until(lambda: len(source.streams["r"]) > 2)
    free = load_of(destination).free_blocks
    move = Move(source, destination, "r")
    move.advance()  # reserves
    arriving = load_of(destination)
    assert arriving.reserved_blocks > 3
    assert arriving.free_blocks == free - arriving.reserved_blocks
    assert arriving.running == arriving.waiting == 0
    move.advance()
    assert load_of(source).running == 1
    move.finish()
    arrived = load_of(destination)
    assert arrived.reserved_blocks == 0
    assert arrived.running + arrived.waiting == 1
    assert arrived.waiting_tokens <= 1  # nothing is computed again
    source.run_to_the_end()
    destination.run_to_the_end()
