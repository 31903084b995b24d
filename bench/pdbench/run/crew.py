"""The processes of a run, from the session's side: senders that load the server, and one that digests what they got."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import perf_counter
from typing import Any, cast

from pdbench.load.requests import Request
from pdbench.run import digester, sender
from pdbench.run.digest import Raw
from pdbench.run.digester import Totals
from pdbench.run.exchange import Endpoint
from pdbench.run.schedule import split
from pdbench.run.sender import Fill, Phase, Report, Task
from pdbench.run.spool import clear
from pdbench.run.watch import Watch

#: seconds between the word to begin and the beginning: enough for it to reach every sender
_BEGIN_S = 0.01
_JOIN_S = 5.0
#: names the moment when a phase begins, once all senders are ready
Agree = Callable[[], Coroutine[Any, Any, float]]


async def soon() -> float:
    """Return the next moment that is early enough for every sender."""
    return perf_counter() + _BEGIN_S


class Crew:
    """Spawned processes, not forked ones: they start small, and own no copy of the session's sockets and threads.

    ``fault`` is called once with what made a process end: an OSError (disk full, say), or a RuntimeError.
    ``progress`` is called with how many requests of the phase have ended, ``failed`` with what was digested.
    """

    def __init__(
        self,
        folder: Path,
        endpoint: Endpoint,
        senders: int,
        *,
        fault: Callable[[BaseException], None],
        progress: Callable[[int], None],
        failed: Callable[[Totals], None],
    ) -> None:
        """Start all of them; raise OSError when that cannot be."""
        self._folder = folder
        self._fault, self._progress, self._failed = fault, progress, failed
        self._answers: dict[Connection, asyncio.Future[object]] = {}
        self._done: dict[Connection, int] = {}
        self._spooled: dict[Connection, int] = {}
        self._processes: list[BaseProcess] = []
        self._senders = [self._start(sender.main, f"sender {number}", endpoint, folder, number) for number in range(senders)]
        self._digester: Connection | None = None
        self._agreeing: asyncio.Future[float] | None = None
        self._halted = self._begun = False
        self._dead: BaseException | None = None

    def begin(self, journal: Path) -> None:
        """Start the process that writes the journal: now the folder is there."""
        self._digester = self._start(digester.main, "digester", self._folder, journal, len(self._senders))

    def _start(self, main: Callable[..., None], name: str, *args: object) -> Connection:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=main, args=(theirs, *args), name=name, daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)
        asyncio.get_running_loop().add_reader(ours.fileno(), self._heard, ours, name)
        return ours

    async def ask(self, api: str, body: bytes) -> Raw:
        """Send one request and return what came back."""
        return cast(Raw, (await self._all(self._senders[:1], [("ask", (api, body))]))[0])

    def enough(self) -> None:
        """Have the phase that runs end with the answers to what was sent."""
        for control in self._done:
            with contextlib.suppress(OSError):  # it is gone: `_heard` says so
                control.send(("enough", None))

    async def phase(
        self, task: Task, requests: Sequence[Request], bodies: Iterable[bytes | Fill], watch: Watch, agree: Agree = soon
    ) -> None:
        """Send all requests and return when every answer is in the journal; ``bodies`` stand in the requests' order.

        What ``agree`` raises is raised, and nothing was sent then.
        ``watch`` is told what there is also when the call is cancelled: what was in flight is then recorded as stopped.
        """
        shares = split(requests, task.slots, len(self._senders))
        crew = self._senders[: len(shares)]
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".bodies-", ignore_cleanup_errors=True) as folder:
            places, fills = await asyncio.to_thread(_store, Path(folder) / "bodies", requests, bodies)
            orders = [
                Phase(
                    replace(task, slots=slots, open_ahead=-(-task.open_ahead // len(shares))),
                    own,
                    Path(folder) / "bodies",
                    {request.index: places[request.index] for request in own if request.index in places},
                    {request.index: fills[request.index] for request in own if request.index in fills},
                )
                for own, slots in shares
            ]
            self._agreeing, self._halted, self._begun = None, False, False
            working = asyncio.ensure_future(self._work(crew, orders, agree))
            try:
                reports = await asyncio.shield(working)
            except asyncio.CancelledError:
                self._halt(crew)
                watch.take(*await self._digested(crew, await working))
                raise
        watch.take(*await self._digested(crew, reports))
        if self._agreeing is not None:
            self._agreeing.result()

    def _halt(self, crew: Sequence[Connection]) -> None:
        """Have the senders stop; those that have not begun are told by `_work` in place of the beginning."""
        self._halted = True
        if self._agreeing is not None:
            self._agreeing.cancel()
        for control in crew if self._begun else ():
            with contextlib.suppress(OSError):
                control.send(("stop", None))

    async def _work(self, crew: Sequence[Connection], orders: Sequence[Phase], agree: Agree) -> list[Report]:
        self._done = dict.fromkeys(crew, 0)
        await self._all(crew, [("phase", order) for order in orders])
        # All are ready: one clock, one beginning.
        word: tuple[str, float] = ("stop", 0.0)
        if not self._halted:
            agreeing = self._agreeing = asyncio.ensure_future(agree())
            await asyncio.wait({agreeing})
            if not self._halted and agreeing.exception() is None:
                word = ("go", agreeing.result())
        self._begun = True
        return cast(list[Report], await self._all(crew, [word] * len(crew)))

    async def _digested(self, crew: Sequence[Connection], reports: list[Report]) -> tuple[list[Report], Totals]:
        self._spooled |= {control: report.spooled for control, report in zip(crew, reports, strict=True)}
        counts = [self._spooled.get(control, 0) for control in self._senders]
        assert self._digester is not None
        return reports, cast(Totals, (await self._all([self._digester], [counts]))[0])

    async def _all(self, crew: Sequence[Connection], orders: Sequence[object]) -> list[object]:
        """Give each its order and wait for what each has to say of it."""
        if self._dead is not None:
            raise self._dead
        for control in crew:
            self._answers[control] = asyncio.get_running_loop().create_future()
        for control, order in zip(crew, orders, strict=True):
            with contextlib.suppress(OSError):  # it is gone: `_heard` says so
                control.send(order)
        return list(await asyncio.gather(*(self._answers[control] for control in crew)))

    def _heard(self, control: Connection, name: str) -> None:
        try:
            what, told = control.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(control.fileno())
            what, told = "fault", RuntimeError(f"the {name} process ended")
        if what == "fault":
            self._dead = told
            for future in self._answers.values():
                if not future.done():
                    future.set_exception(told)
            self._fault(told)
        elif what == "done":
            self._done[control] = told
            self._progress(sum(self._done.values()))
        elif what == "failed":
            self._failed(told)
        else:
            self._answers[control].set_result(told)

    async def close(self) -> None:
        """End all processes."""
        for control in (*self._senders, *([self._digester] if self._digester else [])):
            asyncio.get_running_loop().remove_reader(control.fileno())
            control.close()
        for process in self._processes:
            await asyncio.to_thread(process.join, _JOIN_S)
            process.kill()
        clear(self._folder)


def _store(
    path: Path, requests: Sequence[Request], bodies: Iterable[bytes | Fill]
) -> tuple[dict[int, tuple[int, int]], dict[int, Fill]]:
    """Write the bodies into a file, which every sender maps and none has to hold."""
    places: dict[int, tuple[int, int]] = {}
    fills: dict[int, Fill] = {}
    at = 0
    with path.open("wb") as file:
        for request, body in zip(requests, bodies, strict=True):
            if isinstance(body, bytes):
                file.write(body)
                places[request.index] = (at, len(body))
                at += len(body)
            else:
                fills[request.index] = body
    return places, fills
