"""The sending process: one thread, one `Wire`, told by the session what to send through a pipe."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import signal
from array import array
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, process_time
from typing import Protocol

from pdbench.load.requests import Request
from pdbench.records import Record
from pdbench.run.digest import Raw
from pdbench.run.exchange import Endpoint, Exchange
from pdbench.run.replies import read_reply
from pdbench.run.schedule import Schedule, talks
from pdbench.run.spool import Writer
from pdbench.run.sse import events
from pdbench.run.wire import Wire

#: seconds between two words about how far it is
_TELL_S = 0.25
#: requests sent in a row before answers are looked at again
_BURST = 32
STOPPED = "stopped: the run ended before the answer did"


class Fill(Protocol):
    """A body that needs the answers to earlier requests of its conversation."""

    def fill(self, texts: Mapping[int, str]) -> bytes:
        """Return the body; ``texts``: answers by the index of their requests."""


@dataclass(frozen=True)
class Task:
    """What is done in a phase of a load point.

    Its times count from ``start``, the point's beginning in `perf_counter` seconds; ``slots`` None is an open loop;
    ``open_ahead`` connections are opened before.
    """

    point: int
    phase: str
    api: str
    start: float
    slots: int | None
    open_ahead: int


@dataclass(frozen=True)
class Phase:
    """One sender's part of a task; ``places``: offset and length of a request's body in the file ``bodies``, by index."""

    task: Task
    requests: list[Request]
    bodies: Path
    places: dict[int, tuple[int, int]]
    fills: dict[int, Fill]


@dataclass
class Report:
    """What a sender knows of a phase it went through; times are `perf_counter` seconds, lags in steps of 0.1 ms."""

    wanted: array[float] = field(default_factory=lambda: array("d"))
    sent: array[float] = field(default_factory=lambda: array("d"))
    ended: array[float] = field(default_factory=lambda: array("d"))
    lags: Counter[int] = field(default_factory=Counter)
    stamped: int = 0
    reads: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    spooled: int = 0


def main(control: Connection, endpoint: Endpoint, folder: Path, number: int) -> None:
    """Serve the session until it closes the pipe."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    # Little to do, and that at once: where it may (root, LimitNICE=), it goes before what else runs on the machine.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            sender = _Sender(control, endpoint, folder, number)
            while True:
                what, told = control.recv()
                if what == "ask":
                    control.send(("answer", sender.ask(told)))
                elif what == "phase":
                    control.send(("report", sender.phase(told)))
        except OSError as why:
            control.send(("fault", why))


class _Sender:
    def __init__(self, control: Connection, endpoint: Endpoint, folder: Path, number: int) -> None:
        self._control = control
        self._wire = Wire(endpoint, self._ended)
        self._wire.watch(control.fileno())
        self._folder, self._number = folder, number
        self._spool: Writer | None = None
        self._done: deque[Exchange] = deque()
        self._busy = self._stopped = False
        self._finish: Callable[[Exchange], None] = lambda _: None
        self._close: Callable[[], None] = lambda: None

    def ask(self, told: tuple[str, bytes]) -> Raw:
        """Send one request that is no part of any phase and return what came; `stop` ends it."""
        api, body = told
        answers: list[Exchange] = []
        self._finish = answers.append
        exchange = Exchange(0, perf_counter())
        self._wire.post(exchange, body)
        while not answers:
            self._poll(_TELL_S)
        record = Record(0, 0, "probe", 4, 1)
        body = b"".join(exchange.parts)
        return Raw(
            record, 0.0, api, exchange.status, exchange.content_type, exchange.stamps, exchange.lengths, body, exchange.error
        )

    def phase(self, phase: Phase) -> Report:
        """Send everything; raise OSError when what came cannot be written."""
        spool = self._spool = self._spool or Writer(self._folder, self._number)
        self._wire.open_ahead(phase.task.open_ahead)
        with phase.bodies.open("rb") as file, contextlib.ExitStack() as stack:
            bodies: bytes | mmap.mmap = b""
            if any(length for _, length in phase.places.values()):
                bodies = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            view = stack.enter_context(memoryview(bodies))
            # What lives now lives to the end of the phase, and nothing that is made in it holds itself.
            gc.collect()
            gc.freeze()
            gc.disable()
            try:
                self._control.send(("ready", None))
                what, begin = self._control.recv()
                run = _Run(phase, begin, self._wire, spool, view)
                self._finish, self._close = run.finish, run.close
                if what == "go":
                    self._loop(run)
            finally:
                gc.enable()
                gc.unfreeze()
        run.report.spooled = spool.count
        return run.report

    def _loop(self, run: _Run) -> None:
        wire = self._wire
        wire.lags, wire.stamped, wire.reads = Counter(), 0, 0
        began, cpu, told = perf_counter(), process_time(), 0.0
        while run.unended and not self._stopped:
            for _ in range(_BURST):
                if not run.send():
                    break
            now = perf_counter()
            if now - told >= _TELL_S:
                told = now
                self._control.send(("done", len(run.report.ended)))
            self._poll(min(run.due() - now, _TELL_S))
        if self._stopped:
            wire.stop(STOPPED)
        report = run.report
        report.cpu_s, report.wall_s = process_time() - cpu, perf_counter() - began
        report.lags, report.stamped, report.reads = wire.lags, wire.stamped, wire.reads

    def _poll(self, timeout: float) -> None:
        if self._wire.poll(timeout) and self._control.poll():
            what, _ = self._control.recv()  # EOF: the session is gone
            if what == "enough":
                self._close()
            else:
                self._stopped = True
                self._wire.stop(STOPPED)

    def _ended(self, exchange: Exchange) -> None:
        # `_finish` may send the next request, which may end at once (refused, say): one after the other, not nested.
        self._done.append(exchange)
        if self._busy:
            return
        self._busy = True
        try:
            while self._done:
                self._finish(self._done.popleft())
        finally:
            self._busy = False


class _Run:
    """One phase on its way."""

    def __init__(self, phase: Phase, begin: float, wire: Wire, spool: Writer, bodies: memoryview) -> None:
        self._phase, self._wire, self._spool, self._bodies = phase, wire, spool, bodies
        self._schedule = Schedule(phase.requests, begin, phase.task.slots)
        self._requests = {request.index: request for request in phase.requests}
        self._wanted_answers = {index for filled in phase.fills for index in self._requests[filled].answers}
        self._texts: dict[int, str] = {}
        self._talks = talks(phase.requests)
        self.due, self.close = self._schedule.due, self._schedule.close
        self.report = Report()

    @property
    def unended(self) -> int:
        """How many requests have not ended."""
        return self._schedule.unended

    def send(self) -> bool:
        """Send a request that is due; tell whether there was one."""
        found = self._schedule.take(perf_counter())
        if found is None:
            return False
        request, wanted = found
        exchange = Exchange(request.index, wanted)
        fill = self._phase.fills.get(request.index)
        if fill is None:
            offset, length = self._phase.places[request.index]
            self._wire.post(exchange, self._bodies[offset : offset + length])
        elif self._texts.keys() >= set(request.answers):
            self._wire.post(exchange, fill.fill({index: self._texts[index] for index in request.answers}))
        else:
            exchange.error = "not sent: an earlier turn of its conversation had no answer"
            exchange.ended = perf_counter()
            self.finish(exchange)
        return True

    def finish(self, exchange: Exchange) -> None:
        """Keep what came, and send what its end makes due."""
        task, request = self._phase.task, self._requests[exchange.index]
        if exchange.index in self._wanted_answers and not exchange.error:
            reply = read_reply(task.api, events(b"".join(exchange.parts), exchange.stamps, exchange.lengths))
            if not reply.error:
                self._texts[exchange.index] = reply.text
        self.report.wanted.append(exchange.wanted)
        self.report.sent.append(exchange.sent)
        self.report.ended.append(exchange.ended)
        self._schedule.ended(request, exchange.ended)
        if exchange.error != STOPPED:
            self.send()
        record = Record(task.point, request.index, task.phase, request.isl, request.osl)
        record.conversation, record.turn = self._talks.get(request.index, (-1, 0))
        self._spool.write(record, task.start, task.api, exchange)
