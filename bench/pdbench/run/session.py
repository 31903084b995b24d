"""A whole run: probe the server, go through the load points, leave a complete folder behind."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Protocol, cast

from pdbench import __version__
from pdbench.load.requests import Load
from pdbench.records import MEASURE, WARMUP, read_jsonl, write_json
from pdbench.run.asks import PATHS, ask, prompt_of
from pdbench.run.bodies import Bodies, Target
from pdbench.run.crew import Crew
from pdbench.run.digest import to_record
from pdbench.run.digester import Totals
from pdbench.run.exchange import Endpoint
from pdbench.run.folder import Folder
from pdbench.run.looks import Looks, measured, oversaturated
from pdbench.run.meet import join
from pdbench.run.order import Plan
from pdbench.run.point import OPEN_WARMUP_SLOTS, Part, run_point, until
from pdbench.run.progress import Progress
from pdbench.run.share import MeetError
from pdbench.run.summary import Json, Setup, output_of
from pdbench.run.table import ending, load_name
from pdbench.run.watch import Watch, delivered_closed, delivered_open

if TYPE_CHECKING:
    from pdbench.evidence import Evidence

_VALID, _INVALID = 0, 3


class CannotMeasureError(Exception):
    """Nothing could be measured; the message says why."""


class Visitor(Protocol):
    """Who does something to the workers beside the load; ``why``: what makes the figures no benchmark's."""

    why: str

    async def before(self) -> None:
        """Act between warm-up and measurement."""

    async def during(self) -> None:
        """Act beside warm-up and measurement; cancelled when the measurement has ended."""

    async def after(self) -> None:
        """Leave the workers as they were; called whatever happened."""


class Session:
    """One run, from the probe to the table; `run` returns the exit code."""

    def __init__(self, plan: Plan, folder: Folder, visitor: Visitor | None = None) -> None:
        """Take what to do and where to write; the folder is not touched yet."""
        self._plan = plan
        self._visitor = visitor
        self._folder = folder
        self._stop = asyncio.Event()
        self._fault: BaseException | None = None
        self._complete = False
        self._watches: dict[int, Watch] = {}
        self._evidence: list[Json] = []
        self._verified: Json = {}
        self._ended_early: dict[int, str] = {}
        self._parts: dict[int, Part] = {}
        self._missing: list[str] = []
        self._not_run = ""
        # A point that several clients load is cut by none of them alone.
        self._looks = Looks(plan.until, plan.max_time_s, plan.stop_saturated and plan.share.of == 1)
        self._meeting = join(plan.share, folder.path, self._parted)
        self._progress = Progress(folder.progress, len(plan.loads))

    async def run(self) -> int:
        """Run everything; raise CannotMeasureError or OSError (disk full), after which no summary stands."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        plan = self._plan
        endpoint = Endpoint(plan.url, PATHS[plan.target.api], plan.headers, plan.timeout_s, plan.ca)
        crew = Crew(self._folder.path, endpoint, plan.processes, fault=self._broken, progress=self._ended, failed=self._failed)
        try:
            target = await self._probe(crew)
            self._plan = replace(self._plan, target=target, setup=replace(self._plan.setup, prompt=target.prompt))
            self._folder.begin(self._plan.setup)
            crew.begin(self._folder.journal)
            keeper = asyncio.create_task(self._progress.keep())
            keeper.add_done_callback(self._kept)
            try:
                await self._meet(crew)
            finally:
                keeper.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await keeper
            return self._finish()
        except BaseException as why:
            self._progress.state, self._progress.message = "failed", str(why) or type(why).__name__
            with contextlib.suppress(OSError):
                self._progress.write()
            raise
        finally:
            await self._meeting.close()
            await crew.close()

    async def _meet(self, crew: Crew) -> None:
        """Go through the points together with the other clients, where there are any."""
        try:
            if await until(self._stop, self._meeting.gather(self._fingerprint())):
                await self._points(crew)
        except MeetError as why:
            self._parted(str(why))
        if self._missing and not self._watches:
            raise CannotMeasureError(self._missing[0])

    def _fingerprint(self) -> str:
        """Return what must be alike for all clients of a run."""
        told = json.dumps([__version__, self._plan.url, self._plan.target.model, asdict(self._plan.setup)], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    async def _probe(self, crew: Crew) -> Target:
        """Send one small request: is there a server, does it take our key, does it take token ids?"""
        target = self._plan.target
        kinds = {"auto": ("text",) if target.api == "chat" else ("tokens", "text")}.get(target.prompt, (target.prompt,))
        for kind in kinds:
            prompt = prompt_of(self._plan.prompts, kind, "probe", 0, 4)
            asking = asyncio.create_task(crew.ask(target.api, ask(target.api, kind, target.model, prompt, 1)))
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait({asking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not asking.done():
                asking.cancel()
                raise CannotMeasureError("stopped before the first request was answered")
            raw = await asking
            record, _ = to_record(raw)
            if record.ok:
                if kind != kinds[0]:
                    print("pdbench: the server takes no token ids here; prompts are text, lengths are words", file=sys.stderr)
                return replace(target, prompt=kind)
            # sglang-router 0.3.2 answers token ids on /v1/completions with 422.
            if raw.status not in (400, 422):
                break
        hint = {401: " (--api-key-file?)", 403: " (--api-key-file?)", 404: " (--api, --model?)"}.get(record.status, "")
        where = self._plan.url + PATHS[target.api]
        raise CannotMeasureError(f"{where} did not answer the first request: {record.error}{hint}")

    async def _points(self, crew: Crew) -> None:
        evidence = None
        share, meeting = self._plan.share, self._meeting
        if self._plan.deployment is not None and meeting.leads:
            from pdbench.evidence import Evidence  # aiohttp takes a quarter of a second to import

            evidence = Evidence(self._plan.deployment, self._plan.headers, self._plan.admin, ThreadPoolExecutor(1))
        serial = 1
        try:
            verify = evidence is not None and self._plan.setup.verify_outputs > 0
            if evidence is not None and verify and not await until(self._stop, self._verify(evidence)):
                return
            for number, load in enumerate(self._plan.loads):
                count = self._plan.warmup if self._plan.warmup is not None else (load.concurrency or OPEN_WARMUP_SLOTS)
                warmups = load.warmup(count)
                label = load_name(self._plan.setup.points[number])
                self._progress.phase("warmup", number + 1, count, label)
                part = self._parts[number] = await asyncio.to_thread(Part.of, load, warmups, share.number, share.of)
                lists = {WARMUP: warmups, MEASURE: part.requests}
                bodies = await asyncio.to_thread(Bodies.make, self._plan.target, self._plan.prompts, number, serial, lists)
                serial += count + load.count
                reset: Json = {}
                if self._stop.is_set() or (evidence is not None and not await until(self._stop, evidence.reset(reset))):
                    return
                start = perf_counter()
                self._watches[number] = watch = Watch()
                look = partial(self._look, number, load) if self._looks else None
                warm = partial(self._warm, evidence if warmups else None, start)
                api = self._plan.target.api
                agree = partial(meeting.begin, number, start, len(part.requests))
                work = run_point(crew, self._progress, number, api, part, bodies, start, watch, warm, look, agree)
                if not await self._watched(evidence, number, reset, start, self._together(number, load, work)):
                    return
                if self._not_run:
                    self._progress.points = number + 1
                    break
            self._complete = True
        finally:
            if evidence is not None:
                await evidence.close()

    async def _together(self, number: int, load: Load, work: Coroutine[None, None, None]) -> None:
        """Run a point, wait until the other clients have, too, and decide together whether to go on."""
        if self._visitor is None:
            await work
        else:
            await self._visited(self._visitor, work)
        await self._meeting.ended(number, self._asked(number))
        why, last = "", number == len(self._plan.loads) - 1
        if self._plan.stop_saturated and self._meeting.leads and not last:
            records = await asyncio.to_thread(measured, self._folder.journal, number)
            if await asyncio.to_thread(oversaturated, records, load):
                why = f"{load_name(self._plan.setup.points[number])} was over-saturated (--stop-saturated)"
        self._not_run = await self._meeting.go_on(why, last)

    @staticmethod
    async def _visited(visitor: Visitor, work: Coroutine[None, None, None]) -> None:
        """Run a point with a visitor beside it; what goes wrong with the visitor ends the point."""
        visit, point = asyncio.create_task(visitor.during()), asyncio.create_task(work)
        try:
            await asyncio.wait({visit, point}, return_when=asyncio.FIRST_COMPLETED)
            if visit.done():
                visit.result()
            await point
        finally:
            for task in (visit, point):
                task.cancel()
            await asyncio.gather(visit, point, return_exceptions=True)
            await visitor.after()

    def _asked(self, number: int) -> int:
        """Return how many requests this client was to send at a point, in the end."""
        return len(self._watches[number].spans) if number in self._ended_early else len(self._parts[number].requests)

    async def _verify(self, evidence: Evidence) -> None:
        """Ask every pair whether its KV cache arrives right."""
        from pdbench.run.verify import verify

        plan, count = self._plan, self._plan.setup.verify_outputs
        asked = len(evidence.deployment.pairs) * count
        self._progress.phase("warmup", 1, asked, f"{count} prompts over every pair are verified")
        self._verified = await verify(evidence, plan.prompts, count, plan.headers, plan.timeout_s)

    async def _watched(
        self, evidence: Evidence | None, number: int, reset: Json, start: float, work: Coroutine[None, None, None]
    ) -> bool:
        """Run a point between two snapshots of the servers, with a scrape at intervals; tell whether it ended."""
        if evidence is None:
            return await until(self._stop, work)
        entry: Json = {"point": number, "reset": reset, "before": await evidence.snapshot(perf_counter() - start)}
        self._evidence.append(entry)
        scraper = None
        if self._plan.scrape_every_s > 0:
            scraper = asyncio.create_task(evidence.scrape(number, start, self._plan.scrape_every_s))
        try:
            return await until(self._stop, work)
        finally:
            if scraper is not None:
                scraper.cancel()
                await asyncio.gather(scraper, return_exceptions=True)
            entry["after"] = await evidence.snapshot(perf_counter() - start)
            if self._fault is None:
                verified = {"verify": self._verified} if self._verified else {}
                from pdbench.evidence import write_metrics

                write_json(self._folder.evidence, {"schema": 1, **verified, "points": self._evidence})
                write_metrics(self._folder.server_metrics, evidence.rows)

    async def _warm(self, evidence: Evidence | None, start: float) -> None:
        """Ask the servers between warm-up and measurement, so that their timers can be told apart."""
        if evidence is not None:
            self._evidence[-1]["begin"] = await evidence.snapshot(perf_counter() - start)
        if self._visitor is not None:
            await self._visitor.before()

    async def _look(self, number: int, load: Load) -> None:
        self._ended_early[number] = await self._looks.watch(self._folder.journal, number, load, lambda: self._progress.done)

    def _as_sent(self) -> Setup:
        """Return what was asked for, with fewer requests where a point was ended early."""
        points = [dict(point) for point in self._plan.setup.points]
        for number in self._watches:
            points[number]["num_requests"] = self._asked(number)
        for number, why in self._ended_early.items():
            points[number]["ended_early"] = why
        return replace(self._plan.setup, points=points)

    def _finish(self) -> int:
        if self._fault is not None:
            raise self._fault
        missing, share = list(self._missing), self._plan.share
        if share.of > 1:
            missing.append(f"the share of client {share.number} of {share.of} alone: `pdbench merge` puts them together")
        if not self._complete:
            missing += [f"stopped: {len(self._watches)} of {len(self._plan.loads)} load points were begun"]
        missing += [self._visitor.why] if self._visitor is not None else []
        summary = self._folder.finish(self._as_sent(), self._clients(), missing, self._not_run)
        self._progress.state = "done" if self._complete else "stopped"
        self._progress.write()
        print(ending(summary))
        for reason in cast(list[str], summary["invalid_reasons"]):
            print(f"pdbench: invalid: {reason}", file=sys.stderr)
        return _VALID if summary["valid"] else _INVALID

    def _clients(self) -> dict[int, Json]:
        records = list(read_jsonl(self._folder.journal))
        found = {}
        for number, watch in self._watches.items():
            slots = self._parts[number].slots
            delivered = delivered_open(watch.spans) if slots is None else delivered_closed(watch.spans, slots)
            found[number] = watch.report(*output_of(records, number), delivered)
        return found

    def _ended(self, count: int) -> None:
        self._progress.done = count

    def _failed(self, totals: Totals) -> None:
        self._progress.failed = totals.failed
        for error in totals.errors:
            print(f"pdbench: a request failed: {error}", file=sys.stderr, flush=True)

    def _kept(self, keeper: asyncio.Task[None]) -> None:
        if not keeper.cancelled() and (why := keeper.exception()) is not None:
            self._broken(why)

    def _parted(self, why: str) -> None:
        """Go no further, and keep what there is: another client is gone."""
        if why not in self._missing:
            self._missing.append(why)
        self._progress.message = why
        self._stop.set()

    def _broken(self, why: BaseException) -> None:
        self._fault = self._fault or why
        self._stop.set()
