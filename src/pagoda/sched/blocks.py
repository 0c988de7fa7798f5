"""The pool of KV cache blocks: who holds them, which are free, and which prefix each one can serve again."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from pagoda.types import BLOCK_SIZE, Adapter

_BYTES_PER_BLOCK = 4 * BLOCK_SIZE
_NOTHING: Mapping[int, bytes] = MappingProxyType({})


def root_hash(cache_salt: str, adapter: Adapter | None = None) -> bytes:
    """The parent of a chain's first block; requests with different salts or adapters never share a block."""
    root = hashlib.sha256(b"pagoda prefix\0" + cache_salt.encode("utf-8", "surrogatepass")).digest()
    return root if adapter is None else hashlib.sha256(root + b"adapter\0" + adapter.stamp.encode()).digest()


def chain_hashes(parent: bytes, token_ids: Sequence[int], seen: Mapping[int, bytes] = _NOTHING) -> list[bytes]:
    """One hash per full block of `token_ids`, each covering all tokens before it through its parent's hash.

    `seen`: by the number of a block, what else its content depends on.

    SHA-256 because a collision would serve one user's cache to another: it must not be possible to make one.
    """
    data = np.asarray(token_ids, dtype="<i4").tobytes()
    hashes = []
    for number, end in enumerate(range(_BYTES_PER_BLOCK, len(data) + 1, _BYTES_PER_BLOCK)):
        parent = hashlib.sha256(parent + data[end - _BYTES_PER_BLOCK : end] + seen.get(number, b"")).digest()
        hashes.append(parent)
    return hashes


class BlockPool:
    """Hands out block ids 0..num_blocks-1 and counts their holders.

    A published block can be found by its hash. Without holders it stays findable, and is given away only when no
    blank block is left, the one that has been free the longest first.
    """

    def __init__(self, num_blocks: int) -> None:
        self._holders = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: dict[int, None] = {}  # free and published, oldest first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def total(self) -> int:
        return len(self._holders)

    @property
    def free(self) -> int:
        return len(self._blank) + len(self._cached)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest published prefix of a chain; nobody holds them yet."""
        blocks = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def free_among(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody holds: holding them makes the pool that much smaller."""
        return sum(block in self._cached for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to blocks found by `match`."""
        for block in blocks:
            self._holders[block] += 1
            self._cached.pop(block, None)

    def take(self, count: int) -> list[int]:
        """`count` blocks for new content, each with one holder. The caller has looked at `free`."""
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block = next(iter(self._cached))
                del self._cached[block]
                del self._block_of[self._hash_of.pop(block)]
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Take one holder from each block of a chain.

        Last block first: a chain is of use only from its beginning, so its end must be evicted before its start.
        """
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._blank.append(block)

    def publish(self, block: int, block_hash: bytes) -> bool:
        """Make a held block findable; False when another block with this content already is."""
        if block_hash in self._block_of:
            return False
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash
        return True

    def unpublish(self, blocks: Iterable[int]) -> None:
        """Forget the content of these blocks: it was never written, or is not to be trusted."""
        for block in blocks:
            block_hash = self._hash_of.pop(block, None)
            if block_hash is None:
                continue
            del self._block_of[block_hash]
            if block in self._cached:
                del self._cached[block]
                self._blank.append(block)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the books agree with these holders' lists of blocks."""
        counts: Counter[int] = Counter()
        for blocks in held:
            assert len(set(blocks)) == len(blocks), "a block twice in one request"
            counts.update(blocks)
        assert self._holders == [counts[block] for block in range(self.total)], "holders miscounted"
        free = [*self._blank, *self._cached]
        assert len(free) == len(set(free)), "a block is free twice"
        assert set(free).isdisjoint(counts) and len(free) + len(counts) == self.total, "a block is lost or both"
        assert self._block_of == {h: b for b, h in self._hash_of.items()}, "index and hashes disagree"
        assert len(self._block_of) == len(self._hash_of), "two blocks under one hash"
        assert set(self._cached) == set(self._hash_of).difference(counts), "cached blocks are not the free published"
