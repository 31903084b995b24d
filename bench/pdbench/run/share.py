"""A client's share of a load, and what it has to ask of the others where there are any (`pdbench.run.meet`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdbench.run.crew import soon

#: file of a run's folder that says which share of a run stands in it
SHARE = "share.json"


class MeetError(Exception):
    """The clients cannot go on together; the message says which one is missing."""


@dataclass(frozen=True)
class Share:
    """Client ``number`` (from 1) ``of`` so many, who meet at ``host`` and ``port`` and know each other by ``key``."""

    number: int = 1
    of: int = 1
    host: str = ""
    port: int = 0
    key: str = ""


def offset(samples: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Return how far the other's clock is ahead of ours, and how wrong that may be, in seconds.

    A sample: when we asked (our clock), what the other answered (its clock), when that came (our clock).
    """
    asked, theirs, came = min(samples, key=lambda s: s[2] - s[0])
    return theirs - (asked + came) / 2, (came - asked) / 2


class Alone:
    """The only client of a run, who waits for nobody; what the others are, too."""

    leads = True

    async def gather(self, load: str) -> None:
        """Wait until all clients are there and want to send the same ``load`` (a fingerprint); raise MeetError."""

    async def begin(self, point: int, start: float, asked: int) -> float:
        """Return when the measured requests begin, once all clients are ready; times are our `perf_counter`'s.

        ``start`` is what the point's times count from here, ``asked`` how many requests are our share.
        """
        return await soon()

    async def ended(self, point: int, asked: int) -> None:
        """Wait until all clients have their answers; ``asked``: how many requests our share was in the end."""

    async def go_on(self, why: str, last: bool) -> str:
        """Return why the points that are left are not run, "" when they are; the first client decides (``why``)."""
        return why

    async def close(self) -> None:
        """Leave."""
