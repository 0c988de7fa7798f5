"""The block pool: holders, the prefix index, and the order of eviction."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.sched.blocks import BlockPool, chain_hashes, root_hash
from pagoda.types import BLOCK_SIZE


def chain(length: int, salt: str = "") -> list[bytes]:
    return chain_hashes(root_hash(salt), list(range(length * BLOCK_SIZE)))


def publish(pool: BlockPool, blocks: list[int], hashes: list[bytes]) -> None:
    for block, block_hash in zip(blocks, hashes, strict=True):
        assert pool.publish(block, block_hash)


def test_the_hash_is_sha256_of_parent_and_tokens() -> None:
    root, tokens = root_hash("salt"), list(range(2 * BLOCK_SIZE))
    first = hashlib.sha256(root + struct.pack("<16i", *tokens[:BLOCK_SIZE])).digest()
    second = hashlib.sha256(first + struct.pack("<16i", *tokens[BLOCK_SIZE:])).digest()
    assert chain_hashes(root, tokens) == [first, second]
    assert chain_hashes(first, tokens[BLOCK_SIZE:]) == [second]


def test_only_full_blocks_have_a_hash() -> None:
    assert chain_hashes(root_hash(""), list(range(BLOCK_SIZE - 1))) == []
    assert len(chain_hashes(root_hash(""), list(range(2 * BLOCK_SIZE - 1)))) == 1


def test_the_salt_and_every_earlier_token_change_the_hash() -> None:
    tokens = list(range(3 * BLOCK_SIZE))
    plain = chain_hashes(root_hash(""), tokens)
    assert set(plain).isdisjoint(chain_hashes(root_hash("tenant"), tokens))
    assert chain_hashes(root_hash(""), [99, *tokens[1:]])[-1] != plain[-1]


def test_a_match_stops_at_the_first_block_that_is_missing() -> None:
    pool, hashes = BlockPool(8), chain(4)
    blocks = pool.take(4)
    publish(pool, blocks, hashes)
    assert pool.match(hashes) == blocks
    pool.unpublish([blocks[1]])
    assert pool.match(hashes) == blocks[:1]
    pool.check([blocks])


def test_a_released_chain_can_be_found_and_held_again() -> None:
    pool, hashes = BlockPool(4), chain(2)
    blocks = pool.take(2)
    publish(pool, blocks, hashes)
    pool.release(blocks)
    pool.check([])
    assert pool.free == 4 and pool.free_among(blocks) == 2
    pool.hold(pool.match(hashes))
    assert pool.free == 2 and pool.free_among(blocks) == 0
    pool.check([blocks])


def test_blank_blocks_go_first_then_the_oldest_chain_from_its_end() -> None:
    pool, old, new = BlockPool(5), chain(2), chain(2, "new")
    a, b = pool.take(2), pool.take(2)
    publish(pool, a, old)
    publish(pool, b, new)
    pool.release(a)
    pool.release(b)
    assert pool.take(1) == [4]
    assert pool.take(1) == [a[1]] and pool.match(old) == a[:1]
    assert pool.take(1) == [a[0]] and pool.match(old) == []
    assert pool.match(new) == b
    assert pool.take(1) == [b[1]] and pool.match(new) == b[:1]


def test_use_makes_a_chain_young_again() -> None:
    pool, old, new = BlockPool(2), chain(1), chain(1, "new")
    a, b = pool.take(1), pool.take(1)
    publish(pool, a, old)
    publish(pool, b, new)
    pool.release(a)
    pool.release(b)
    pool.hold(a)
    pool.release(a)
    assert pool.take(1) == b


def test_a_shared_block_is_free_only_when_its_last_holder_leaves() -> None:
    pool, hashes = BlockPool(2), chain(1)
    blocks = pool.take(1)
    publish(pool, blocks, hashes)
    pool.hold(blocks)
    pool.release(blocks)
    assert pool.free == 1
    pool.check([blocks])
    pool.release(blocks)
    assert pool.free == 2


def test_the_same_content_is_published_once() -> None:
    pool, hashes = BlockPool(2), chain(1)
    a, b = pool.take(1), pool.take(1)
    assert pool.publish(a[0], hashes[0]) and not pool.publish(b[0], hashes[0])
    assert pool.match(hashes) == a
    pool.release(a)
    pool.release(b)
    pool.check([])


def test_unpublishing_a_free_block_makes_it_blank() -> None:
    pool, hashes = BlockPool(3), chain(2)
    blocks = pool.take(2)
    publish(pool, blocks, hashes)
    pool.release(blocks)
    pool.unpublish([*blocks, *blocks])
    assert pool.match(hashes) == [] and pool.free == 3
    pool.check([])


@pytest.mark.parametrize("damage", ["holders", "lost", "index", "twice"])
def test_the_check_sees_damage(damage: str) -> None:
    pool, hashes = BlockPool(4), chain(1)
    blocks = pool.take(2)
    publish(pool, blocks[:1], hashes)
    pool.check([blocks])
    if damage == "holders":
        pool._holders[blocks[0]] = 2
    elif damage == "lost":
        pool._blank.pop()
    elif damage == "index":
        del pool._hash_of[blocks[0]]
    else:
        pool._blank.append(blocks[1])
    with pytest.raises(AssertionError):
        pool.check([blocks])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ttru"), st.integers(0, 5), st.integers(1, 4)), max_size=60))
def test_the_books_agree_after_any_operations(operations: list[tuple[str, int, int]]) -> None:
    """Take a chain (whatever of it is there already is shared) and publish the rest, release, unpublish."""
    pool, holders = BlockPool(10), list[list[int]]()
    for kind, which, length in operations:
        hashes = chain(length, str(which % 3))
        if kind == "t":
            found = pool.match(hashes)
            if length - len(found) + pool.free_among(found) <= pool.free:
                pool.hold(found)
                fresh = pool.take(length - len(found))
                for block, block_hash in zip(fresh, hashes[len(found) :], strict=True):
                    pool.publish(block, block_hash)
                holders.append(found + fresh)
        elif kind == "r" and holders:
            pool.release(holders.pop(which % len(holders)))
        elif kind == "u":
            pool.unpublish(pool.match(hashes)[-1:])
        pool.check(holders)
    for blocks in holders:
        pool.release(blocks)
    pool.check([])
    assert pool.free == 10
