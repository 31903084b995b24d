"""The prefix cache against the plainest thing that does the same: a set of prefixes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdbench.model.radix import WIDTH, Node, RadixCache, pack

prompts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=25)


def known(cache: RadixCache, ids: list[int]) -> int:
    return cache.match(pack(ids))[1]


def depth(node: Node) -> int:
    return node.tokens + depth(node.parent) if node.parent else 0


@given(prompts, st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_it_finds_the_longest_prefix_that_was_put_in(seen: list[list[int]], asked: list[int]) -> None:
    cache, prefixes = RadixCache(), set[tuple[int, ...]]()
    for ids in seen:
        fresh = sum(tuple(ids[:end]) not in prefixes for end in range(1, len(ids) + 1))
        node, added = cache.insert(pack(ids))
        assert (added, depth(node)) == (fresh, len(ids))
        prefixes |= {tuple(ids[:end]) for end in range(1, len(ids) + 1)}
        assert cache.total == len(prefixes)
    best = max((end for end in range(len(asked) + 1) if tuple(asked[:end]) in prefixes or end == 0), default=0)
    assert known(cache, asked) == best


@given(prompts, st.data())
def test_what_is_locked_stays_and_the_rest_can_go(seen: list[list[int]], data: st.DataObject) -> None:
    cache = RadixCache()
    kept = []
    for ids in seen:
        node, _ = cache.insert(pack(ids))
        if data.draw(st.booleans()):
            cache.lock(node)
            kept.append((ids, node))
    wanted = data.draw(st.integers(0, cache.total))
    could = cache.total - cache.locked
    freed = cache.evict(wanted)
    assert freed >= min(wanted, could)
    assert freed <= could
    assert all(known(cache, ids) == len(ids) for ids, _ in kept)
    for _, node in kept:
        cache.unlock(node)
    assert cache.locked == 0
    cache.clear()
    assert (cache.total, known(cache, seen[0])) == (0, 0)


def test_the_least_recently_used_leaf_goes_first() -> None:
    cache = RadixCache()
    for ids in ([1, 1], [2, 2], [3, 3]):
        cache.insert(pack(ids))
    known(cache, [1, 1])
    assert cache.evict(2) == 2
    assert [known(cache, [n, n]) for n in (1, 2, 3)] == [2, 0, 2]


def test_a_token_is_as_wide_as_packed() -> None:
    assert len(pack([0, 2**31 - 1])) == 2 * WIDTH
