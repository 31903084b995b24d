"""One load point: warm-up, then the measured requests, everything recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

from pdbench.load.requests import Load, Request
from pdbench.records import MEASURE, WARMUP
from pdbench.run.bodies import Bodies
from pdbench.run.crew import Agree, Crew, soon
from pdbench.run.progress import Progress
from pdbench.run.schedule import share
from pdbench.run.sender import Task
from pdbench.run.watch import Watch

#: an open loop may need any number of connections; this many are opened ahead, the rest when they are needed
_OPEN_AHEAD_MOST = 256
#: concurrency of an open loop's warm-up
OPEN_WARMUP_SLOTS = 8
Step = Callable[[], Coroutine[None, None, None]]


@dataclass(frozen=True)
class Part:
    """What one client sends at a point: ``requests`` in ``slots`` (None: an open loop), ``warmups`` before."""

    requests: Sequence[Request]
    slots: int | None
    warmups: Sequence[Request]
    warmup_slots: int

    @classmethod
    def of(cls, load: Load, warmups: Sequence[Request], client: int, clients: int) -> Part:
        """Return the part of ``client`` (from 1) of ``clients``; the first warms up for all."""
        requests, slots = share(load.measured(), load.concurrency, client, clients)
        return cls(requests, slots, warmups if client == 1 else (), load.concurrency or OPEN_WARMUP_SLOTS)


async def run_point(
    crew: Crew,
    progress: Progress,
    number: int,
    api: str,
    part: Part,
    bodies: Bodies,
    start: float,
    watch: Watch,
    warm: Step | None = None,
    look: Step | None = None,
    agree: Agree = soon,
) -> None:
    """Warm up, then measure, and tell ``watch`` of the client; times count from ``start``, `perf_counter` seconds.

    ``warm`` is waited for between the phases, ``agree`` names the moment when measuring begins, ``look`` runs beside it, and
    no more is sent when it returns.

    Warm-up requests never exceed the concurrency that is measured (in an open loop: OPEN_WARMUP_SLOTS), and all of them
    have ended before the first measured request goes out. When cancelled, what is in flight is recorded as stopped.
    """
    requests, slots = part.requests, part.slots
    if part.warmups:
        task = Task(number, WARMUP, api, start, part.warmup_slots, min(part.warmup_slots, len(part.warmups)))
        await crew.phase(task, part.warmups, bodies.warmup, Watch())
    if warm is not None:
        await warm()
    last_due = max((r.due_s or 0.0 for r in requests), default=0.0) if slots is None else None
    progress.phase("running", number + 1, len(requests), progress.label, last_due)
    ahead = min(slots or _OPEN_AHEAD_MOST, len(requests))
    looking: asyncio.Task[None] | None = None

    async def begin() -> float:
        nonlocal looking
        at = await agree()
        if look is not None:
            looking = asyncio.create_task(look())
            looking.add_done_callback(lambda done: None if done.cancelled() else crew.enough())
        return at

    try:
        await crew.phase(Task(number, MEASURE, api, start, slots, ahead), requests, bodies.measure, watch, begin)
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
