"""What happens beside the load: decode gathers a batch, the profiler takes its steps, everybody is let go again.

The procedure is the one by which DeepSeek-R1's PD setups are profiled: slow the decode workers down, send one batch, wait until
they have gathered it, release them, record a few steps. Prefill needs no slowing: it is profiled while it has a queue.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pdbench.profiling.targets import ANSWER_S, Asker, AskError, Target, gathered, room
from pdbench.run.session import CannotMeasureError

#: seconds between two looks at how many requests a worker has
_LOOK_S = 0.25
#: looks in a row without another request, after which the batch is as large as it gets (not before half of what was wanted)
_STILL_S = 20.0
#: a scheduler that is being profiled answers when a step, or the writing of a trace, is over
_TRACE_S = 600.0


@dataclass(frozen=True)
class Wish:
    """What is to be recorded of which ``role``, prefill or decode; ``id``: what the engine calls the traces.

    ``slow_down_s``: seconds before every decode step while the batch is gathered; 0: not slowed. ``batch``: requests that a
    worker is to have before its steps are recorded; None: as many as fit into it of what is sent. ``request_tokens``: the
    longest prompt with its output; ``sent``: requests in flight at most, over all workers.
    """

    role: str
    id: str
    steps: int
    slow_down_s: float
    batch: int | None
    within_s: float
    activities: tuple[str, ...]
    record_shapes: bool
    request_tokens: int
    sent: int


@dataclass
class Outcome:
    """What came of it, by worker; ``problems``: why there is no good trace."""

    wanted: dict[str, int] = field(default_factory=dict)
    gathered: dict[str, int] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    cut_short: list[str] = field(default_factory=list)
    slowed_s: float = 0.0
    problems: list[str] = field(default_factory=list)


class Steering:
    """Goes along with a session of `pdbench run` (its ``visitor``); leaves no worker slowed or profiled, whatever happens."""

    #: why the run's figures are no benchmark
    why = "workers were profiled (and decode slowed down before): its figures are no benchmark"

    def __init__(
        self,
        workers: tuple[Target, ...],
        wish: Wish,
        headers: Mapping[str, str],
        admin: Mapping[str, str],
        admin_file: Path | None,
    ) -> None:
        """Touch nothing yet; ``admin`` and ``admin_file``: the key for what changes a worker, and where it lies."""
        self._workers, self._wish, self._headers, self._admin, self._admin_file = workers, wish, headers, admin, admin_file
        self.outcome = Outcome()
        self._asker: Asker | None = None
        self._recording: asyncio.Task[None] | None = None
        self._guard: asyncio.subprocess.Process | None = None
        self._slowed_at = 0.0
        self._ready = asyncio.Event()

    async def before(self) -> None:
        """Between warm-up and load: slow the workers down, once somebody watches that they are released."""
        self._asker = Asker(self._headers, self._admin)
        if self._wish.role == "decode" and self._wish.slow_down_s:
            await self._watch()
            self._slowed_at = time.monotonic()
            try:
                await self._all("slow_down", {"forward_sleep_time": self._wish.slow_down_s}, ANSWER_S)
            except AskError as why:
                raise CannotMeasureError(f"decode cannot be slowed down: {why}") from None
            _say(f"decode sleeps {self._wish.slow_down_s:g} s before every step, and gathers a batch")
        self._ready.set()

    async def during(self) -> None:
        """Beside the load: wait for the batch, release, record."""
        await self._ready.wait()
        try:
            await (self._batch() if self._wish.role == "decode" else self._busy())
            await self._release()
            self._recording = asyncio.create_task(self._record())
            # The load may end, and we with it, while a worker begins to record: `after` must know that it has.
            await asyncio.shield(self._recording)
        except AskError as why:
            self.outcome.problems.append(str(why))
            await self._release()

    async def after(self) -> None:
        """When the load has ended: release what is slowed, end a profile that has not had its steps."""
        if self._asker is None:
            return
        try:
            await self._release()
            if self._recording is not None:
                await self._recording
            for worker in self._workers:
                if worker.name in self.outcome.started:
                    try:
                        # One that has ended by itself answers with an error.
                        await self._asker.post(f"{worker.url}/stop_profile", {}, _TRACE_S)
                        self.outcome.cut_short.append(worker.name)
                    except AskError:
                        continue
            if not self.outcome.started and not self.outcome.problems:
                self.outcome.problems.append(self._never())
        finally:
            await self._asker.close()

    def _never(self) -> str:
        if self._wish.role == "prefill":
            return "the load ended before a prefill worker was seen with requests: send more, or longer prompts"
        wanted = ", ".join(f"{name} {self.outcome.gathered.get(name, 0)} of {n}" for name, n in self.outcome.wanted.items())
        return f"the load ended before decode had gathered its batch ({wanted}): a longer output, or a longer profile_slow_down"

    async def _watch(self) -> None:
        """Start the guard (`pdbench.profiling.guard`), which outlives us by as long as it takes to release the workers."""
        orders = {
            "urls": [worker.url for worker in self._workers],
            "key_file": str(self._admin_file) if self._admin_file else None,
            "within_s": self._wish.within_s + 2 * self._wish.slow_down_s + 60,
        }
        command = [sys.executable, "-m", "pdbench.profiling.guard"]
        # A session of its own: what ends our process group does not end it.
        self._guard = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, start_new_session=True, env=os.environ
        )
        assert self._guard.stdin is not None
        self._guard.stdin.write(json.dumps(orders).encode() + b"\n")
        await self._guard.stdin.drain()

    async def _release(self) -> None:
        """Take slow_down back; only then is the guard told that it need not."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        assert guard.stdin is not None
        try:
            await self._all("slow_down", {"forward_sleep_time": None}, ANSWER_S + 2 * self._wish.slow_down_s)
            self.outcome.slowed_s = time.monotonic() - self._slowed_at
            guard.stdin.write(b"released\n")
        finally:
            # Without that line, the guard does it.
            guard.stdin.close()

    async def _all(self, path: str, body: Mapping[str, object], within_s: float) -> None:
        assert self._asker is not None
        asked = [self._asker.post(f"{worker.url}/{path}", body, within_s) for worker in self._workers]
        for answer in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer

    async def _batch(self) -> None:
        """Wait until every decode worker has as many requests as are wanted; raise AskError when they do not come."""
        wish, outcome = self._wish, self.outcome
        answer_s, end = ANSWER_S + 2 * wish.slow_down_s, time.monotonic() + wish.within_s
        share = -(-wish.sent // len(self._workers))
        for name, loads in (await self._loads(answer_s)).items():
            fits = room(loads, wish.request_tokens)
            outcome.wanted[name] = wish.batch or (min(share, fits) if fits else share)
        most, since = -1, time.monotonic()
        while True:
            outcome.gathered = {name: gathered(loads) for name, loads in (await self._loads(answer_s)).items()}
            missing = {name: n for name, n in outcome.wanted.items() if outcome.gathered[name] < n}
            if not missing:
                break
            here = sum(outcome.gathered.values())
            if here > most:
                most, since = here, time.monotonic()
            have = ", ".join(f"{name} has {outcome.gathered[name]} of {n}" for name, n in missing.items())
            enough = all(2 * outcome.gathered[name] >= n for name, n in missing.items()) and wish.batch is None
            if enough and time.monotonic() - since > _STILL_S + wish.slow_down_s:
                _say(f"no more requests come ({have}): recording what there is")
                break
            if time.monotonic() > end:
                raise AskError(f"decode gathered no batch in {wish.within_s:g} s: {have} (profile_batch, profile_timeout)")
            await asyncio.sleep(_LOOK_S)
        _say("gathered: " + ", ".join(f"{name} {n}" for name, n in outcome.gathered.items()))

    async def _busy(self) -> None:
        """Wait until every prefill worker has requests; raise AskError when they do not come."""
        end, waiting = time.monotonic() + self._wish.within_s, {worker.name for worker in self._workers}
        while waiting:
            for name, loads in (await self._loads(ANSWER_S)).items():
                here = sum(
                    int(str(load.get("num_running_reqs", 0))) + int(str(load.get("num_waiting_reqs", 0))) for load in loads
                )
                if here:
                    self.outcome.gathered[name] = here
                    waiting.discard(name)
            if waiting and time.monotonic() > end:
                raise AskError(f"no request came to {', '.join(sorted(waiting))} in {self._wish.within_s:g} s")
            await asyncio.sleep(_LOOK_S / 5)

    async def _loads(self, within_s: float) -> dict[str, list[Mapping[str, object]]]:
        assert self._asker is not None
        workers = self._workers
        found = await asyncio.gather(*(self._asker.loads(worker.url, within_s) for worker in workers))
        return {worker.name: loads for worker, loads in zip(workers, found, strict=True)}

    async def _record(self) -> None:
        assert self._asker is not None
        wish = self._wish

        async def start(name: str, url: str, folder: str) -> None:
            body = {
                "output_dir": folder,
                "num_steps": wish.steps,
                "activities": list(wish.activities),
                "record_shapes": wish.record_shapes,
                # Stacks take ten times the room, and slow every step.
                "with_stack": False,
                "profile_id": wish.id,
            }
            assert self._asker is not None
            await self._asker.post(f"{url}/start_profile", body, _TRACE_S)
            self.outcome.started.append(name)

        asked = [start(worker.name, worker.url, worker.folder) for worker in self._workers]
        for answer in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(answer, AskError):
                self.outcome.problems.append(str(answer))
            elif isinstance(answer, BaseException):
                raise answer
        _say(f"{wish.steps} steps are recorded on {', '.join(self.outcome.started) or 'no worker'}")


def _say(text: str) -> None:
    print(f"pdbench profile: {text}", file=sys.stderr, flush=True)
