"""Reference counts, reuse and eviction of cache blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from localmoe.engine.block_pool import BlockPool, block_name, root_name


def names(token_ids: list[int], block_tokens: int) -> list[bytes]:
    """Names of all full blocks of these tokens."""
    chain, name = [], root_name("")
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        name = block_name(name, token_ids[start : start + block_tokens])
        chain.append(name)
    return chain


def publish_chain(pool: BlockPool, blocks: list[int], token_ids: list[int], block_tokens: int) -> None:
    for block, name in zip(blocks, names(token_ids, block_tokens), strict=True):
        pool.publish(block, name)


def test_a_freed_block_is_found_again_until_it_is_reused() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    publish_chain(pool, blocks, [1, 2, 3, 4], block_tokens=2)
    pool.free(blocks)
    assert pool.num_free == 4
    assert pool.find_prefix(names([1, 2, 3, 4, 5], 2)) == blocks
    assert pool.find_prefix(names([1, 2, 9, 9], 2)) == blocks[:1]
    pool.allocate(4)
    assert pool.find_prefix(names([1, 2, 3, 4], 2)) == []


def test_the_same_tokens_after_another_prefix_are_another_block() -> None:
    pool = BlockPool(4)
    publish_chain(pool, pool.allocate(2), [1, 2, 3, 4], block_tokens=2)
    assert pool.find_prefix(names([3, 4], 2)) == []


def test_eviction_takes_the_tail_of_a_prefix_first() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    publish_chain(pool, blocks, [1, 2, 3, 4, 5, 6], block_tokens=2)
    pool.free(blocks)
    pool.allocate(1)
    assert pool.find_prefix(names([1, 2, 3, 4, 5, 6], 2)) == blocks[:2]


def test_a_block_that_nobody_can_find_goes_before_those_that_can_be_found() -> None:
    pool = BlockPool(4)
    named, nameless = pool.allocate(2), pool.allocate(2)
    publish_chain(pool, named, [1, 2, 3, 4], block_tokens=2)
    pool.free(named)
    pool.free(nameless)
    assert sorted(pool.allocate(2)) == nameless
    assert pool.find_prefix(names([1, 2, 3, 4], 2)) == named


def test_freeing_twice_is_a_bug_that_shows() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_names_depend_on_every_token(token_ids: list[int]) -> None:
    name = block_name(root_name(""), token_ids)
    changed = [token_ids[0] ^ 1, *token_ids[1:]]
    assert block_name(root_name(""), changed) != name
    assert block_name(name, token_ids) != name


class PoolMachine(RuleBasedStateMachine):
    """Random users of a pool: counts must add up whatever they do."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.held: list[list[int]] = []
        self.next_token = 0

    @rule(count=st.integers(1, 5))
    def allocate(self, count: int) -> None:
        if count <= self.pool.num_free:
            blocks = self.pool.allocate(count)
            self.next_token += 1
            publish_chain(self.pool, blocks, [self.next_token] * count, block_tokens=1)
            self.held.append(blocks)

    @precondition(lambda self: self.next_token > 0)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        token = data.draw(st.integers(1, self.next_token))
        found = self.pool.find_prefix(names([token] * 5, 1))
        self.pool.refer(found)
        self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def nothing_is_lost(self) -> None:
        in_use = {block for blocks in self.held for block in blocks}
        assert self.pool.num_free == self.pool.num_blocks - len(in_use)


TestPoolMachine = PoolMachine.TestCase
