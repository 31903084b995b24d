"""When the next request goes out: a closed loop of slots, or an open loop on a schedule."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter

from pdbench.load.requests import Request

#: sends one request and returns when its answer has ended; takes the time it was wanted, `perf_counter` seconds
Send = Callable[[Request, float], Awaitable[None]]


async def closed_loop(requests: Sequence[Request], slots: int, send: Send) -> None:
    """Keep ``slots`` requests in flight; the next one starts at once when one has ended."""
    waiting = iter(requests)

    async def slot() -> None:
        for request in waiting:
            await send(request, perf_counter())

    async with asyncio.TaskGroup() as group:
        for _ in range(min(slots, len(requests))):
            group.create_task(slot())


async def open_loop(requests: Sequence[Request], send: Send) -> None:
    """Send each request at its ``due_s`` after now, however many are unanswered; return when all have ended."""
    start = perf_counter()

    async def sent(request: Request, due: float) -> None:
        await send(request, due)

    async with asyncio.TaskGroup() as group:
        for request in requests:
            due = start + (request.due_s or 0.0)
            while (delay := due - perf_counter()) > 0:
                await asyncio.sleep(delay)
            group.create_task(sent(request, due))
