"""One load point: warm-up, then the measured requests, everything recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence

from pdbench.load.requests import Load, Request
from pdbench.records import MEASURE, WARMUP
from pdbench.run.bodies import Bodies
from pdbench.run.crew import Crew
from pdbench.run.progress import Progress
from pdbench.run.sender import Task
from pdbench.run.watch import Watch

#: an open loop may need any number of connections; this many are opened ahead, the rest when they are needed
_OPEN_AHEAD_MOST = 256
#: concurrency of an open loop's warm-up
OPEN_WARMUP_SLOTS = 8
Step = Callable[[], Coroutine[None, None, None]]


async def run_point(
    crew: Crew,
    progress: Progress,
    number: int,
    api: str,
    load: Load,
    warmups: Sequence[Request],
    bodies: Bodies,
    start: float,
    watch: Watch,
    warm: Step | None = None,
    look: Step | None = None,
) -> None:
    """Warm up, then measure, and tell ``watch`` of the client; times count from ``start``, `perf_counter` seconds.

    ``warm`` is waited for between the phases; ``look`` runs beside the measured one, and no more is sent when it returns.

    Warm-up requests never exceed the concurrency that is measured (in an open loop: OPEN_WARMUP_SLOTS), and all of them
    have ended before the first measured request goes out. When cancelled, what is in flight is recorded as stopped.
    """
    requests = load.measured()
    slots = load.concurrency or OPEN_WARMUP_SLOTS
    if warmups:
        task = Task(number, WARMUP, api, start, slots, min(slots, len(warmups)))
        await crew.phase(task, warmups, bodies.warmup, Watch())
    if warm is not None:
        await warm()
    last_due = max((r.due_s or 0.0 for r in requests), default=0.0) if load.open_loop else None
    progress.phase("running", number + 1, len(requests), progress.label, last_due)
    ahead = min(load.concurrency or _OPEN_AHEAD_MOST, len(requests))
    looking = None
    if look is not None:
        looking = asyncio.create_task(look())
        looking.add_done_callback(lambda done: None if done.cancelled() else crew.enough())
    try:
        await crew.phase(Task(number, MEASURE, api, start, load.concurrency, ahead), requests, bodies.measure, watch)
    finally:
        if looking is not None:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)


async def until(stop: asyncio.Event, work: Coroutine[None, None, None]) -> bool:
    """Run ``work`` until it is done (True), or until ``stop`` is set: then cancel it and return False."""
    task = asyncio.create_task(work)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return False
    return True
