"""A whole run: probe the server, go through the load points, leave a complete folder behind."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import sys
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, cast

from pdbench.enough import Target as Goal
from pdbench.enough import Verdict, enough, next_look
from pdbench.load.prompts import Prompts
from pdbench.load.requests import Load
from pdbench.records import MEASURE, WARMUP, read_jsonl, write_json
from pdbench.run.asks import PATHS, ask, prompt_of
from pdbench.run.bodies import Bodies, Target
from pdbench.run.crew import Crew
from pdbench.run.digest import to_record
from pdbench.run.digester import Totals
from pdbench.run.exchange import Endpoint
from pdbench.run.folder import Folder
from pdbench.run.point import OPEN_WARMUP_SLOTS, run_point, until
from pdbench.run.progress import Progress
from pdbench.run.summary import Json, Setup, output_of
from pdbench.run.table import load_name, render
from pdbench.run.watch import Watch, delivered_closed, delivered_open

if TYPE_CHECKING:
    from pdbench.evidence import Deployment, Evidence

_VALID, _INVALID = 0, 3
#: seconds between looks at how far a point is
_LOOK_S = 0.5


class CannotMeasureError(Exception):
    """Nothing could be measured; the message says why."""


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to know; ``warmup`` None: as many requests as the concurrency (8 in an open loop)."""

    url: str
    target: Target
    loads: Sequence[Load]
    setup: Setup
    prompts: Prompts
    warmup: int | None
    timeout_s: float
    headers: Mapping[str, str]
    deployment: Deployment | None
    scrape_every_s: float
    processes: int = 1
    until: tuple[Goal, ...] = ()
    max_time_s: float = math.inf


class Session:
    """One run, from the probe to the table; `run` returns the exit code."""

    def __init__(self, plan: Plan, folder: Folder) -> None:
        """Take what to do and where to write; the folder is not touched yet."""
        self._plan = plan
        self._folder = folder
        self._stop = asyncio.Event()
        self._fault: BaseException | None = None
        self._complete = False
        self._watches: dict[int, Watch] = {}
        self._evidence: list[Json] = []
        self._verified: Json = {}
        self._ended_early: dict[int, str] = {}
        self._progress = Progress(folder.progress, len(plan.loads))

    async def run(self) -> int:
        """Run everything; raise CannotMeasureError or OSError (disk full), after which no summary stands."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        plan = self._plan
        endpoint = Endpoint(plan.url, PATHS[plan.target.api], plan.headers, plan.timeout_s)
        crew = Crew(self._folder.path, endpoint, plan.processes, fault=self._broken, progress=self._ended, failed=self._failed)
        try:
            target = await self._probe(crew)
            self._plan = replace(self._plan, target=target, setup=replace(self._plan.setup, prompt=target.prompt))
            self._folder.begin(self._plan.setup)
            crew.begin(self._folder.journal)
            keeper = asyncio.create_task(self._progress.keep())
            keeper.add_done_callback(self._kept)
            try:
                await self._points(crew)
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
            await crew.close()

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
        if self._plan.deployment is not None:
            from pdbench.evidence import Evidence  # aiohttp takes a quarter of a second to import

            evidence = Evidence(self._plan.deployment, self._plan.headers, ThreadPoolExecutor(1))
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
                lists = {WARMUP: warmups, MEASURE: load.measured()}
                bodies = await asyncio.to_thread(Bodies.make, self._plan.target, self._plan.prompts, number, serial, lists)
                serial += count + load.count
                reset: Json = {}
                if self._stop.is_set() or (evidence is not None and not await until(self._stop, evidence.reset(reset))):
                    return
                start = perf_counter()
                self._watches[number] = watch = Watch()
                look = None
                if self._plan.until or self._plan.max_time_s < math.inf:
                    look = partial(self._look, number, load.concurrency)
                warm = partial(self._warm, evidence, start) if evidence is not None and warmups else None
                api = self._plan.target.api
                work = run_point(crew, self._progress, number, api, load, warmups, bodies, start, watch, warm, look)
                if not await self._watched(evidence, number, reset, start, work):
                    return
            self._complete = True
        finally:
            if evidence is not None:
                await evidence.close()

    async def _verify(self, evidence: Evidence) -> None:
        """Ask every pair whether its KV cache arrives right; the workers are idle, and the next point empties their caches."""
        deployment, count = evidence.deployment, self._plan.setup.verify_outputs
        if not deployment.engine.verifiable:
            reason = "the prefill workers of this engine cannot be asked for the log-probabilities of an answer"
            self._verified = {"prompts": count, "reason": reason, "pairs": []}
            return
        self._progress.phase("warmup", 1, len(deployment.pairs) * count, f"{count} prompts over every pair are verified")
        from pdbench.run.verify import Verifier

        verifier = Verifier(deployment, self._plan.headers, self._plan.timeout_s)
        try:
            await evidence.reset({})
            await verifier.ask(self._plan.prompts, count)
            emptied: Json = {}
            await evidence.reset(emptied)
            await verifier.compare(emptied)
        finally:
            await verifier.close()
        self._verified = verifier.report(count)

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

    async def _warm(self, evidence: Evidence, start: float) -> None:
        """Ask the servers between warm-up and measurement, so that their timers can be told apart."""
        self._evidence[-1]["begin"] = await evidence.snapshot(perf_counter() - start)

    async def _look(self, number: int, slots: int | None) -> None:
        """Return when the measured phase of a point has lasted long enough, or what was wanted is known well enough."""
        began, at = perf_counter(), next_look(0)
        while (spent := perf_counter() - began) < self._plan.max_time_s:
            await asyncio.sleep(min(_LOOK_S, self._plan.max_time_s - spent))
            if self._plan.until and self._progress.done >= at:
                at = next_look(self._progress.done)
                verdict = await asyncio.to_thread(self._judge, number, slots)
                print(f"pdbench: {verdict.message}", file=sys.stderr, flush=True)
                if verdict.done:
                    self._ended_early[number] = f"known well enough: {verdict.message}"
                    return
        self._ended_early[number] = f"after {self._plan.max_time_s:g} s"

    def _judge(self, number: int, slots: int | None) -> Verdict:
        records = [r for r in read_jsonl(self._folder.journal) if r.point == number and r.phase == MEASURE]
        return enough(records, self._plan.until, slots)

    def _as_sent(self) -> Setup:
        """Return what was asked for, with fewer requests where a point was ended early."""
        points = [dict(point) for point in self._plan.setup.points]
        for number, why in self._ended_early.items():
            points[number] |= {"num_requests": len(self._watches[number].spans), "ended_early": why}
        return replace(self._plan.setup, points=points)

    def _finish(self) -> int:
        if self._fault is not None:
            raise self._fault
        missing = []
        if not self._complete:
            missing = [f"stopped: {len(self._watches)} of {len(self._plan.loads)} load points were begun"]
        summary = self._folder.finish(self._as_sent(), self._clients(), missing)
        self._progress.state = "done" if self._complete else "stopped"
        self._progress.write()
        print(render(cast(list[Json], summary["points"])))
        for reason in cast(list[str], summary["invalid_reasons"]):
            print(f"pdbench: invalid: {reason}", file=sys.stderr)
        return _VALID if summary["valid"] else _INVALID

    def _clients(self) -> dict[int, Json]:
        records = list(read_jsonl(self._folder.journal))
        found = {}
        for number, watch in self._watches.items():
            slots = self._plan.loads[number].concurrency
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

    def _broken(self, why: BaseException) -> None:
        self._fault = self._fault or why
        self._stop.set()
