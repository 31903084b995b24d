"""One load point: warm-up, then the measured requests, everything recorded."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from pdbench.load.prompts import Prompts
from pdbench.load.requests import Load, Request
from pdbench.records import MEASURE, WARMUP, Record
from pdbench.run.asks import PATHS, ask, prompt_of
from pdbench.run.client import Client, Exchange
from pdbench.run.digest import Digest, Raw, digest
from pdbench.run.loops import closed_loop, open_loop
from pdbench.run.progress import Progress
from pdbench.run.watch import Span, Watch

#: an open loop may need any number of connections; this many are opened ahead, the rest when they are needed
_OPEN_AHEAD_MOST = 256
#: seconds over which ended requests are collected before they are handed over
_BATCH_S = 0.05
#: different errors that are shown while the run goes on
_ERRORS_TOLD = 5
#: concurrency of an open loop's warm-up
OPEN_WARMUP_SLOTS = 8


@dataclass(frozen=True)
class Target:
    """What every request of a run has in common."""

    api: str
    prompt: str
    model: str


class Sender:
    """Sends requests of one phase of a point, and hands what came back to the digesting process.

    ``fault`` is called with an OSError when a record could not be written: the run then has no use.
    """

    def __init__(
        self, client: Client, target: Target, pool: Executor, progress: Progress, fault: Callable[[BaseException], None]
    ) -> None:
        """Take the tools."""
        self._client = client
        self._target = target
        self._pool = pool
        self._progress = progress
        self._fault = fault
        self._pending: set[asyncio.Future[list[Digest]]] = set()
        self._waiting: list[Raw] = []
        self._flush: asyncio.TimerHandle | None = None
        self._told: set[str] = set()
        self._digest_cpu_s = 0.0
        self._watch = Watch()

    async def phase(
        self,
        number: int,
        phase: str,
        start: float,
        bodies: Sequence[bytes],
        drive: Callable[..., Coroutine[None, None, None]],
        watch: Watch,
    ) -> None:
        """Drive one phase to its end, or to its cancellation, while ``watch`` measures the client.

        ``drive`` is a loop of `pdbench.run.loops` that wants only its ``send``; ``bodies`` are indexed as requests.
        """
        watch.begin()
        cpu_before = self._digest_cpu_s
        ticker = asyncio.create_task(watch.tick())

        async def send(request: Request, wanted: float) -> None:
            record = Record(number, request.index, phase, request.isl, request.osl)
            exchange = Exchange()
            try:
                await self._client.post(PATHS[self._target.api], bodies[request.index], exchange)
            except asyncio.CancelledError:
                exchange.error = "stopped: the run ended before the answer did"
                raise
            finally:
                self._hand_over(watch, record, exchange, start, wanted)

        try:
            await drive(send=send)
        finally:
            ticker.cancel()
            watch.stop()
            await self.digested()
            watch.digest_cpu_s = self._digest_cpu_s - cpu_before

    async def digested(self) -> None:
        """Wait until everything handed over stands in the journal."""
        if self._flush is not None:
            self._flush.cancel()
        if self._waiting:
            self._submit()
        if self._pending:
            await asyncio.wait(set(self._pending))

    def _hand_over(self, watch: Watch, record: Record, exchange: Exchange, start: float, wanted: float) -> None:
        watch.spans.append(Span(wanted, exchange.sent, perf_counter()))
        record.scheduled_s, record.sent_s = wanted - start, exchange.sent - start
        self._progress.done += 1
        self._watch = watch
        # In batches, because in a closed loop answers end together, just when the next requests should go out.
        self._waiting.append(
            Raw(record, start, self._target.api, exchange.status, exchange.content_type, exchange.reads, exchange.error)
        )
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(_BATCH_S, self._submit)

    def _submit(self) -> None:
        batch, self._waiting, self._flush = self._waiting, [], None
        try:
            future = asyncio.wrap_future(self._pool.submit(digest, batch))
        except RuntimeError as why:  # the digesting process is gone
            self._fault(why)
            return
        self._pending.add(future)
        future.add_done_callback(partial(self._note, self._watch))

    def _note(self, watch: Watch, future: asyncio.Future[list[Digest]]) -> None:
        self._pending.discard(future)
        if future.cancelled():
            return
        broken = future.exception()
        if broken is not None:
            self._fault(broken)
            return
        for result in future.result():
            self._digest_cpu_s = max(self._digest_cpu_s, result.cpu_s)
            if result.ok:
                watch.reads += result.reads
            else:
                self._failed(result.error)

    def _failed(self, error: str) -> None:
        self._progress.failed += 1
        if error not in self._told and len(self._told) < _ERRORS_TOLD:
            self._told.add(error)
            print(f"pdbench: a request failed: {error}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Bodies:
    """The encoded requests of a point, made before it starts."""

    warmup: list[bytes]
    measure: list[bytes]

    @classmethod
    def make(cls, target: Target, prompts: Prompts, number: int, serial: int, lists: Mapping[str, Sequence[Request]]) -> Bodies:
        """Encode all requests; ``serial`` counts the prompts of the points before this one."""
        made: dict[str, list[bytes]] = {}
        for phase, requests in lists.items():
            made[phase] = []
            for request in requests:
                name = f"{number}/{phase}/{request.index}"
                prompt = prompt_of(prompts, target.prompt, name, serial, request.isl)
                made[phase].append(ask(target.api, target.prompt, target.model, prompt, request.osl))
                serial += 1
        return cls(made[WARMUP], made[MEASURE])


async def run_point(
    sender: Sender,
    client: Client,
    progress: Progress,
    number: int,
    load: Load,
    warmups: list[Request],
    bodies: Bodies,
    start: float,
    watch: Watch,
) -> None:
    """Warm up, then measure, while ``watch`` measures the client; times are relative to ``start``.

    Warm-up requests never exceed the concurrency that is measured (in an open loop: OPEN_WARMUP_SLOTS), and all of them
    have ended before the first measured request goes out. When cancelled, what is in flight is recorded as stopped.
    """
    requests = load.measured()
    slots = load.concurrency or OPEN_WARMUP_SLOTS
    if warmups:
        await client.open_ahead(min(slots, len(warmups)))
        await sender.phase(number, WARMUP, start, bodies.warmup, partial(closed_loop, warmups, slots), Watch())
    await client.open_ahead(min(load.concurrency or _OPEN_AHEAD_MOST, len(requests)))
    # What lives now lives to the end of the point: a collection during it need not look at it again.
    gc.collect()
    gc.freeze()
    last_due = requests[-1].due_s if load.open_loop else None
    progress.phase("running", number + 1, len(requests), progress.label, last_due)
    drive = partial(open_loop, requests) if load.open_loop else partial(closed_loop, requests, slots)
    try:
        await sender.phase(number, MEASURE, start, bodies.measure, drive, watch)
    finally:
        gc.unfreeze()


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
