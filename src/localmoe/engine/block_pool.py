"""Who holds which cache block, and which blocks' contents can be reused.

A block is free when nothing refers to it. A free block keeps its contents, and its name, until it is handed out
again; so the list of free blocks, oldest first, is at once the prefix cache and its eviction order. One without a
name can be found by nobody, and goes first. A full block's name is a digest over its tokens and the name of the block
before it, hence over the whole prefix.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def root_name(scope: str) -> bytes:
    """Name of the empty prefix, another one in each scope."""
    return hashlib.sha256(scope.encode()).digest()


def block_name(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of a full block. Cryptographic, so that no prompt can be made to collide with another's."""
    return hashlib.sha256(parent + array("I", token_ids).tobytes()).digest()


class BlockPool:
    """Reference counts and names of `num_blocks` blocks. Knows no tensor."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_refs = [0] * num_blocks
        self._name_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take the `count` least recently used free blocks; their old contents are forgotten."""
        assert count <= self.num_free, "the caller checks num_free first"
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._num_refs[block] = 1
        self.forget(blocks)
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each. Later blocks of a prefix are forgotten first: they are useless without
        the earlier ones."""
        for block in reversed(blocks):
            self._num_refs[block] -= 1
            assert self._num_refs[block] >= 0, f"block {block} freed twice"
            if self._num_refs[block] == 0:
                self._free[block] = None
                if self._name_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, name: bytes) -> None:
        """Let others find a block whose contents are complete. The first of several equals keeps the name."""
        if name not in self._block_of and self._name_of[block] is None:
            self._block_of[name] = block
            self._name_of[block] = name

    def forget(self, blocks: Sequence[int]) -> None:
        """Take back the names of blocks whose contents turned out not to be usable."""
        for block in blocks:
            name = self._name_of[block]
            if name is not None:
                del self._block_of[name]
                self._name_of[block] = None

    def find_prefix(self, names: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known beginning of these names, without taking references."""
        found = []
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def num_unused(self, blocks: Sequence[int]) -> int:
        """How many of these are free now, so that referring to them would shrink the free list."""
        return sum(self._num_refs[block] == 0 for block in blocks)

    def refer(self, blocks: Sequence[int]) -> None:
        """Take a reference to each of these found blocks."""
        for block in blocks:
            if self._num_refs[block] == 0:
                del self._free[block]
            self._num_refs[block] += 1
