"""When the next request of a phase goes out: a closed loop of slots, or an open loop on a schedule."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from math import inf

from pdbench.load.requests import Request


class Schedule:
    """The requests of one sending process in order; times are `perf_counter` seconds.

    ``slots`` requests are in flight in a closed loop, the next following at once when one has ended; None is an open loop:
    each goes out at its ``due_s`` after ``start``, however many are unanswered. A request with ``after`` goes out
    ``think_s`` after the end of that one; in a closed loop the slot waits for it.
    """

    def __init__(self, requests: Sequence[Request], start: float, slots: int | None) -> None:
        """Take the requests; nothing has been sent."""
        first = [r for r in requests if r.after is None]
        self._heads = deque(sorted(first, key=lambda r: r.due_s or 0.0) if slots is None else first)
        self._next = {r.after: r for r in requests if r.after is not None}
        self._start = start
        self._free = None if slots is None else deque([start] * min(slots, len(first)))
        self._thinking: list[tuple[float, int, Request]] = []
        self.unended = len(requests)
        self._flying = 0

    def due(self) -> float:
        """Return when the next request is to be sent as far as is known now; infinity when an answer must end first."""
        head = inf
        if self._heads and self._free is None:
            head = self._start + (self._heads[0].due_s or 0.0)
        elif self._heads and self._free:
            head = self._free[0]
        return min(head, self._thinking[0][0]) if self._thinking else head

    def take(self, now: float) -> tuple[Request, float] | None:
        """Return a request that is due and when it was wanted; None when there is none."""
        if self.due() > now:
            return None
        self._flying += 1
        if self._thinking and self._thinking[0][0] <= now:
            wanted, _, request = heapq.heappop(self._thinking)
            return request, wanted
        if self._free is None:
            request = self._heads.popleft()
            return request, self._start + (request.due_s or 0.0)
        return self._heads.popleft(), self._free.popleft()

    def close(self) -> None:
        """Send no more: what is in flight is all that will end, and conversations break off."""
        self._heads.clear()
        self._thinking.clear()
        self._next.clear()
        self.unended = self._flying

    def ended(self, request: Request, at: float) -> None:
        """Note that a request's answer ended, or that it was given up."""
        self.unended -= 1
        self._flying -= 1
        follower = self._next.pop(request.index, None)
        if follower is not None:
            heapq.heappush(self._thinking, (at + follower.think_s, follower.index, follower))
        elif self._free is not None:
            self._free.append(at)


def split(requests: Sequence[Request], slots: int | None, parts: int) -> list[tuple[list[Request], int | None]]:
    """Share requests and slots out over ``parts`` processes, whole conversations to one; fewer parts than slots are made.

    A part gets as many of the conversations as it has slots of all; a request by itself counts as one.
    """
    if slots is not None:
        parts = max(1, min(parts, slots))
    owner: dict[int, int] = {}
    shares: list[list[Request]] = [[] for _ in range(parts)]
    heads = 0
    for request in requests:
        if request.after is None:
            owner[request.index] = (heads if slots is None else heads % slots) % parts
            heads += 1
        else:
            owner[request.index] = owner[request.after]
        shares[owner[request.index]].append(request)
    own = [None if slots is None else slots // parts + (k < slots % parts) for k in range(parts)]
    return list(zip(shares, own, strict=True))


def share(requests: Sequence[Request], slots: int | None, number: int, of: int) -> tuple[list[Request], int | None]:
    """Return the part of client ``number`` (from 1) of ``of``; one for whom there is no slot has nothing to send."""
    parts = split(requests, slots, of)
    return parts[number - 1] if number <= len(parts) else ([], 0)


def talks(requests: Sequence[Request]) -> dict[int, tuple[int, int]]:
    """Return (index of its first request, turn from 1 up) of every request of a conversation, by index; {} without any."""
    if all(request.after is None for request in requests):
        return {}
    found: dict[int, tuple[int, int]] = {}
    for request in requests:
        first, turn = (request.index, 0) if request.after is None else found[request.after]
        found[request.index] = (first, turn + 1)
    return found
