"""A worker's memory for KV: what requests hold, and the prefix cache, which gives way to them."""

from __future__ import annotations

from pdbench.model.radix import RadixCache
from pdbench.model.requests import Limits, Request


class Memory:
    """Counted in tokens; `limits` may change while no request is here."""

    def __init__(self, limits: Limits) -> None:
        """Start empty."""
        self.limits = limits
        self.cache = RadixCache()
        self.own_tokens = 0

    @property
    def used(self) -> int:
        """Return the tokens in use by requests; what only the prefix cache holds is not."""
        return self.own_tokens + self.cache.locked

    def take(self, tokens: int) -> None:
        """Hold `tokens` more; whoever calls has made sure that they are there."""
        self.own_tokens += tokens
        lacking = self.own_tokens + self.cache.total - self.limits.capacity
        if lacking > 0:
            self.cache.evict(lacking)

    def free(self) -> int:
        """Return the tokens that can be had, those of the prefix cache that nobody runs on included."""
        return self.limits.capacity - self.own_tokens - self.cache.locked

    def release(self, request: Request) -> None:
        """Give back all that a request holds."""
        self.own_tokens -= request.own
        request.own = 0
        request.base = request.computed = 0
        if request.node is not None:
            self.cache.unlock(request.node)
            request.node = None

    def look_up(self, request: Request) -> None:
        """Find the part of the prompt that is in the cache; the last token is always computed, for its logits."""
        if request.node is not None or not (self.limits.prefix_cache and request.prompt):
            return
        node, known = self.cache.match(request.prompt[: 4 * (request.prompt_tokens - 1)])
        self.cache.lock(node)
        request.node, request.base, request.computed = node, known, known

    def remember(self, request: Request) -> None:
        """Hand the prompt's KV over to the prefix cache; what it had already is held once only."""
        if not (self.limits.prefix_cache and request.prompt):
            return
        node, _ = self.cache.insert(request.prompt)
        self.cache.lock(node)
        mine = request.prompt_tokens - request.base
        if request.node is not None:
            self.cache.unlock(request.node)
        request.node = node
        request.own -= mine
        self.own_tokens -= mine
