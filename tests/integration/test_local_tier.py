"""Migration beside vLLM's offloading connector: what goes to the tier is what it is stored as."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.v1.request import RequestStatus

from migration.errors import DestinationRefusedError
from migration.messages import BlockRun, KvPart
from migration.vllm_engine.compatibility import unsupported_config, unsupported_engine
from migration.vllm_engine.engine_load import read_load
from tests.integration.played_tier import offloading_config
from tests.integration.scheduler_lab import (
    KINDS,
    Kind,
    Layers,
    Move,
    Node,
    nodes_at_rest,
    undisturbed,
)

pytestmark = pytest.mark.integration

FULL = (Layers(block_tokens=4),)
WINDOW = (Layers("window", 4, window=6),)
PROMPT = list(range(100, 122))
SYNC = KINDS[0]

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


@kinds
def test_blocks_that_the_tier_still_reads_are_not_free_for_a_request_that_comes(kind: Kind) -> None:
    with nodes_at_rest() as make:
        a, b = make(kind, layers=FULL), make(kind, layers=FULL, num_blocks=13, offloading=True)
        b.add("ends", list(range(200, 224)), 3)
        b.run_until(lambda: "ends" in b.ended)
        a.add("moves", PROMPT)
        a.decode("moves", 2)

        assert b.free_blocks == 12
        move = Move(a, b, "moves")
        move.advance()
        assert "free KV blocks" in move.why
        prefix = b.request("prefix", list(range(300, 330)), 1)
        offered = KvPart(28, [BlockRun(0, [1] * 7)])
        with pytest.raises(DestinationRefusedError, match="free"):
            b.scheduler.migrated_blocks.prefixes.reserve("copy", prefix, offered, 0)
        assert b.free_blocks == 12

        b.run_to_the_end()
        assert b.runner.tier is not None
        assert b.runner.tier.chunks
        move = Move(a, b, "moves")
        move.advance()
        assert not move.why
        move.cancel()
        a.scheduler.finish_requests("moves", RequestStatus.FINISHED_ABORTED)


@kinds
@pytest.mark.parametrize("confirmed", [True, False])
def test_what_has_come_goes_to_the_tier_once_it_is_confirmed_and_serves_others(
    kind: Kind, confirmed: bool
) -> None:
    with nodes_at_rest() as make:
        a, b = make(kind, layers=FULL), make(kind, layers=FULL, offloading=True)
        tier: Any = b.runner.tier
        a.add("moves", PROMPT, 40)
        a.decode("moves", 2)
        move = Move(a, b, "moves")
        while not move.committed:
            move.advance(suspend=True)
            a.step()
        b.decode("moves", 30)
        assert not tier.chunks
        if confirmed:
            move.advance()
        else:
            move.cancel()
        b.run_to_the_end()
        assert b.streams["moves"] == undisturbed(PROMPT, 40, FULL)
        assert bool(tier.chunks) == confirmed

        assert b.scheduler.reset_prefix_cache()
        again = PROMPT + b.streams["moves"]
        b.add("again", again, 5)
        b.run_to_the_end()
        assert b.streams["again"] == undisturbed(again, 5, FULL)
        assert bool(tier.loaded) == confirmed


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)  # where steps overlap, other blocks are taken
def test_blocks_of_a_former_window_are_not_stored_when_a_request_has_come_into_them(kind: Kind) -> None:
    with nodes_at_rest() as make:
        a, b = make(kind, layers=WINDOW), make(kind, layers=WINDOW, offloading=True)
        a.add("first", PROMPT, 60)
        a.add("second", PROMPT, 60)
        a.decode("second", 2)
        move = Move(a, b, "first")
        while not move.committed:
            move.advance(suspend=True)
            a.step()
        b.decode("first", 40)  # its former window is free, and was not stored: it is not confirmed
        stored_from = (
            b.scheduler.connector.scheduler._req_status[b.stay_of("first")].group_states[0].block_ids
        )
        before = set(stored_from)

        second = Move(a, b, "second")
        second.advance()
        (taken,) = second.tables
        assert before & set(taken)
        assert not set(stored_from) & set(taken)

        move.advance()
        second.finish()
        for request_id in ("first", "second"):
            b.run_until(lambda request_id=request_id: request_id in b.ended)
            assert b.streams[request_id] == undisturbed(PROMPT, 60, WINDOW)


@kinds
def test_a_suspended_request_keeps_no_engine_with_a_tier_busy(kind: Kind) -> None:
    with nodes_at_rest() as make:
        node = make(kind, layers=FULL, offloading=True)
        request = node.add("r", PROMPT, 30)
        node.decode("r", 2)
        answer = node.wait_for_stage(request, len(PROMPT), suspend=True)
        node.run_until(lambda: not node.scheduler.has_requests())
        assert answer.final.request is request
        node.scheduler.resume("r")


@kinds
def test_blocks_of_a_request_that_waits_for_the_tier_are_counted_once(kind: Kind) -> None:
    with nodes_at_rest() as make:
        node = make(kind, layers=FULL, offloading=True)
        node.add("first", PROMPT, 3)
        node.run_to_the_end()
        node.scheduler.reset_prefix_cache()
        node.add("again", PROMPT, 3)
        node.step()
        load = read_load(node.scheduler)
        assert load.waiting == 1
        assert load.total_blocks - load.free_blocks == 5
        assert load.head_of_line_blocks == load.waiting_blocks == 1


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, None),
        (offloading_config(), None),
        (KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both"), "a KV connector of its own"),
        (
            KVTransferConfig(
                kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_module_path="theirs"
            ),
            "a KV connector of its own",
        ),
    ],
)
def test_of_the_connectors_the_local_tier_lets_requests_move(config: Any, why: str | None) -> None:
    found = unsupported_config(SimpleNamespace(kv_transfer_config=config))
    assert (found is None) == (why is None)
    assert (why or "") in (found or "")


def test_states_beside_a_tier_stay() -> None:
    """vLLM stores them from blocks that are in no table."""
    states = (*FULL, Layers("state", 4, mode="align"))
    node = Node(SYNC, layers=states, offloading=True)
    why = unsupported_engine(SimpleNamespace(kv_transfer_config=offloading_config()), node.scheduler)
    assert why == "linear attention beside a KV tier"
