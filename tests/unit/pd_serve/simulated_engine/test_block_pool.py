"""Block accounting: nothing is lost, nothing is held twice, and what is cached is what it says."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pd_serve.simulated_engine.block_pool import BlockPool
from pd_serve.simulated_engine.contents import GARBAGE

NUM_BLOCKS = 12


def test_freed_blocks_hold_garbage() -> None:
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.content[block] = 7

    pool.release([block])

    assert list(pool.content) == [GARBAGE, GARBAGE]


def test_a_published_block_is_found_until_its_place_is_needed() -> None:
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.content[block] = 7
    pool.publish(block, 99)
    pool.release([block])
    assert (pool.cached([99]), pool.num_free, pool.content[block]) == ([block], 2, 7)

    taken = pool.allocate(2)

    assert (pool.cached([99]), sorted(taken), pool.content[block]) == ([], [0, 1], GARBAGE)


def test_the_longest_unused_is_evicted_first_and_of_a_sequence_its_end() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    for number, block in enumerate(blocks):
        pool.publish(block, number)
    pool.release(blocks[:2])
    pool.release(blocks[2:])

    evicted = [pool.allocate(1)[0] for _ in range(4)]

    assert evicted == [blocks[1], blocks[0], blocks[3], blocks[2]]


def test_lost_and_twice_held_blocks_violate_integrity() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)

    assert pool.check_integrity(blocks) == []
    assert pool.check_integrity(blocks[:1]) != []
    assert pool.check_integrity([*blocks, blocks[0]]) != []


class PoolMachine(RuleBasedStateMachine):
    """Any sequence of operations, against holders that are kept beside."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.holders: list[list[int]] = []
        self.names = iter(range(10_000))
        self.published: dict[int, int] = {}

    @rule(count=st.integers(1, 5))
    def allocate(self, count: int) -> None:
        if count <= self.pool.num_free:
            blocks = self.pool.allocate(count)
            for block in blocks:
                self.pool.content[block] = next(self.names)
            self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.holders))))
        value = self.pool.content[block] + 1_000_000
        self.pool.publish(block, value)
        self.published[value] = self.pool.content[block]

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        value = data.draw(st.sampled_from(sorted(self.published)))
        found = self.pool.cached([value])
        for block in found:
            assert self.pool.content[block] == self.published[value]
        if found:
            self.pool.share(found)
            self.holders.append(found)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        self.pool.release(self.holders.pop(index))

    @invariant()
    def adds_up(self) -> None:
        held = [block for blocks in self.holders for block in blocks]
        assert self.pool.check_integrity(held) == []
        assert self.pool.num_free == NUM_BLOCKS - len(set(held))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=40)
