"""The prefix cache: a radix tree over token ids with least-recently-used eviction of leaves, as in SGLang's RadixCache.

Prompts are `bytes`, `WIDTH` bytes a token, because comparing and cutting them is then done in C.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from itertools import count

WIDTH = 4


def pack(ids: Sequence[int]) -> bytes:
    """Return token ids (0 to 2^31 - 1) as the cache keeps them."""
    return array("i", ids).tobytes()


def unpack(packed: bytes) -> list[int]:
    """Return the token ids that `pack` took."""
    ids = array("i")
    ids.frombytes(packed)
    return ids.tolist()


class Node:
    """One edge of the tree and what hangs below it; `locks` counts the running requests that need it."""

    __slots__ = ("children", "key", "locks", "parent", "used")

    def __init__(self, key: bytes, parent: Node | None, used: int) -> None:
        """Hang an edge of `key` below `parent`."""
        self.key, self.parent, self.used = key, parent, used
        self.children: dict[bytes, Node] = {}
        self.locks = 0

    @property
    def tokens(self) -> int:
        """Return the tokens on this edge."""
        return len(self.key) // WIDTH


def _common(one: bytes, other: bytes, start: int) -> int:
    """Return how many tokens `one` shares with `other[start:]`."""
    end = min(len(one), len(other) - start)
    if one[:end] == other[start : start + end]:
        return end // WIDTH
    low, high = 0, end // WIDTH  # low tokens are equal, high are not
    while high - low > 1:
        middle = (low + high) // 2
        if one[low * WIDTH : middle * WIDTH] == other[start + low * WIDTH : start + middle * WIDTH]:
            low = middle
        else:
            high = middle
    return low


class RadixCache:
    """Tokens of finished and running prompts. `total` are all its tokens, `locked` those that must stay."""

    def __init__(self) -> None:
        """Start empty."""
        self._ticks = count()
        self.root = Node(b"", None, 0)
        self.total = self.locked = 0

    def match(self, prompt: bytes) -> tuple[Node, int]:
        """Return where the longest known prefix ends, and its length in tokens."""
        node, at, now = self.root, 0, next(self._ticks)
        while at < len(prompt):
            child = node.children.get(prompt[at : at + WIDTH])
            if child is None:
                break
            same = _common(child.key, prompt, at)
            if same < child.tokens:
                child = self._split(child, same)
            child.used = now
            node, at = child, at + same * WIDTH
        return node, at // WIDTH

    def insert(self, prompt: bytes) -> tuple[Node, int]:
        """Make a prompt known; return where it ends, and how many of its tokens were new."""
        node, known = self.match(prompt)
        rest = prompt[known * WIDTH :]
        if rest:
            child = Node(rest, node, next(self._ticks))
            node.children[rest[:WIDTH]] = child
            self.total += child.tokens
            node = child
        return node, len(rest) // WIDTH

    def _split(self, node: Node, tokens: int) -> Node:
        """Cut an edge after `tokens` tokens; return the upper part."""
        parent = node.parent
        assert parent is not None
        cut = tokens * WIDTH
        upper = Node(node.key[:cut], parent, node.used)
        upper.locks = node.locks
        parent.children[upper.key[:WIDTH]] = upper
        node.key, node.parent = node.key[cut:], upper
        upper.children[node.key[:WIDTH]] = node
        return upper

    def lock(self, node: Node) -> None:
        """Keep a prefix while a request needs it."""
        step: Node | None = node
        while step is not None and step.parent is not None:
            if step.locks == 0:
                self.locked += step.tokens
            step.locks += 1
            step = step.parent

    def unlock(self, node: Node) -> None:
        """Undo one `lock`."""
        step: Node | None = node
        while step is not None and step.parent is not None:
            step.locks -= 1
            if step.locks == 0:
                self.locked -= step.tokens
            step = step.parent

    def evict(self, tokens: int) -> int:
        """Give up leaves, the least recently used first, until `tokens` are free or none is left; return how many it gave up."""
        leaves = [(node.used, id(node), node) for node in self._leaves() if not node.locks]
        heapq.heapify(leaves)
        freed = 0
        while freed < tokens and leaves:
            node = heapq.heappop(leaves)[2]
            parent = node.parent
            assert parent is not None
            del parent.children[node.key[:WIDTH]]
            freed += node.tokens
            if parent.parent is not None and not parent.children and not parent.locks:
                heapq.heappush(leaves, (parent.used, id(parent), parent))
        self.total -= freed
        return freed

    def _leaves(self) -> list[Node]:
        found, stack = [], list(self.root.children.values())
        while stack:
            node = stack.pop()
            if node.children:
                stack.extend(node.children.values())
            else:
                found.append(node)
        return found

    def clear(self) -> int:
        """Forget everything that is not locked; return the tokens."""
        return self.evict(self.total)
