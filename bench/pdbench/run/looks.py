"""Looks at a load point while it runs: has it lasted long enough, is enough known, is it over-saturated for certain?"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from pdbench import steady
from pdbench.enough import Target, enough, next_look
from pdbench.load.requests import Load
from pdbench.records import MEASURE, Record, read_jsonl

#: seconds between looks at how far a point is
_LOOK_S = 0.5
#: looks in a row that must find a point over-saturated (one is wrong once in forty where it is not), or known well enough
#: (the first narrow interval is often a lucky one)
_CERTAIN = 2


@dataclass(frozen=True)
class Looks:
    """What may end a point before its last request; ``saturated``: that it is over-saturated."""

    until: tuple[Target, ...] = ()
    max_time_s: float = math.inf
    saturated: bool = False

    def __bool__(self) -> bool:
        """Tell whether there is anything to look for."""
        return bool(self.until) or self.max_time_s < math.inf or self.saturated

    async def watch(self, journal: Path, number: int, load: Load, done: Callable[[], int]) -> str:
        """Return why point ``number`` may end, once it may; ``done`` tells how many of its requests have ended."""
        began, at, sure, known = perf_counter(), next_look(0), 0, 0
        while (spent := perf_counter() - began) < self.max_time_s:
            await asyncio.sleep(min(_LOOK_S, self.max_time_s - spent))
            if done() < at or not (self.until or self.saturated):
                continue
            at = next_look(done())
            records = await asyncio.to_thread(measured, journal, number)
            if self.saturated:
                sure = sure + 1 if await asyncio.to_thread(oversaturated, unbroken(records), load) else 0
                if sure == _CERTAIN:
                    return "over-saturated: what was in flight grew without end"
            if self.until:
                verdict = await asyncio.to_thread(enough, records, self.until, load.concurrency)
                print(f"pdbench: {verdict.message}", file=sys.stderr, flush=True)
                known = known + 1 if verdict.done else 0
                if known == _CERTAIN:
                    return f"known well enough: {verdict.message}"
        return f"after {self.max_time_s:g} s"


def measured(journal: Path, number: int) -> list[Record]:
    """Return what the journal has of a point's measured requests."""
    return [r for r in read_jsonl(journal) if r.point == number and r.phase == MEASURE]


def unbroken(records: Sequence[Record]) -> list[Record]:
    """Return the records before the first request, in the order of sending, that is not answered yet.

    Up to there the requests in flight at any time are known in full, as `steady.saturation` needs them.
    """
    found = sorted(records, key=lambda r: r.index)
    return [record for place, record in enumerate(found) if record.index == place]


def oversaturated(records: Sequence[Record], load: Load) -> bool:
    """Tell whether `steady.saturation` is sure that the servers cannot do what an even open loop asks for."""
    return load.rate is not None and load.rate_to is None and steady.saturation(records)["oversaturated"] is True
