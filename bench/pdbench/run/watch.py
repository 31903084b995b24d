"""What the client knows about itself: did it keep up, and what did it cost?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pdbench.metrics import Stats, stats
from pdbench.run.wire import LAG_STEPS

if TYPE_CHECKING:
    from pdbench.run.digester import Totals
    from pdbench.run.sender import Report


class Span(NamedTuple):
    """One request from the sender's side: wanted, sent and ended, `perf_counter` seconds (sent NaN: never)."""

    wanted: float
    sent: float
    ended: float


@dataclass(slots=True)
class Watch:
    """What the client found out about itself in one phase: CPU time, read delay, lateness, load delivered.

    ``busy`` is the CPU time of the busiest sending process as a share of the phase: at 1 it can take no more.
    """

    spans: list[Span] = field(default_factory=list)
    lags: Counter[int] = field(default_factory=Counter)
    processes: int = 0
    stamped: int = 0
    all_reads: int = 0
    reads: int = 0
    cpu_s: float = 0.0
    busy: float | None = None

    def take(self, reports: Sequence[Report], totals: Totals) -> None:
        """Put together what the senders and the digesting process report."""
        for report in reports:
            self.spans += map(Span, report.wanted, report.sent, report.ended)
            self.lags += report.lags
            self.stamped += report.stamped
            self.all_reads += report.reads
        self.processes = len(reports)
        self.reads = totals.reads
        self.cpu_s = totals.cpu_s + sum(report.cpu_s for report in reports)
        self.busy = max((report.cpu_s / report.wall_s for report in reports if report.wall_s), default=None)

    def report(self, tokens: int, events: int, delivered: float | None) -> dict[str, object]:
        """Return ``client`` of summary.json; ``tokens`` and ``events`` are sums over the good requests.

        ``cpu_s`` counts the sending and the digesting processes. ``loop_lag_ms`` is the delay between the arrival of bytes
        and their being read, and ``stamped_share`` the share of the reads whose stamp it does not touch, because the
        kernel's was taken. Of what is read in one go only the last stamp is known; how long the process was away bounds the
        others, and counts as delay, too.
        """
        late = [s.sent - s.wanted for s in self.spans if s.sent == s.sent]
        return {
            "cpu_s": self.cpu_s,
            "processes": self.processes,
            "busy": self.busy,
            "loop_lag_ms": lag(self.lags),
            "stamped_share": self.stamped / self.all_reads if self.all_reads else None,
            "send_lateness_ms": brief(late),
            "tokens_per_event": tokens / events if events else None,
            "events_per_read": events / self.reads if self.reads else None,
            "delivered_load": delivered,
        }


#: ``client`` of a point whose sender is gone (a recovered run): the keys stay, nothing is known
UNKNOWN: dict[str, object] = {
    "cpu_s": None,
    "processes": None,
    "busy": None,
    "loop_lag_ms": {"p50": None, "p99": None, "max": None},
    "stamped_share": None,
    "send_lateness_ms": {"p50": None, "p99": None, "max": None},
    "tokens_per_event": None,
    "events_per_read": None,
    "delivered_load": None,
}


def brief(seconds: Sequence[float]) -> Stats:
    """Return p50, p99 and max in milliseconds."""
    full = stats(1000 * s for s in seconds)
    return {name: full[name] for name in ("p50", "p99", "max")}


def lag(counts: Counter[int]) -> Stats:
    """Return p50, p99 and max in milliseconds of delays that were counted in steps of 1/LAG_STEPS s; steps are rounded up."""
    found: Stats = {"p50": None, "p99": None, "max": None}
    passed, whole = 0, counts.total()
    for step in sorted(counts):
        passed += counts[step]
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
            if found[name] is None and passed >= share * whole:
                found[name] = (step + 1) * 1000 / LAG_STEPS
    return found


def delivered_closed(spans: Sequence[Span], slots: int) -> float | None:
    """Return the share of ``slots`` that did not wait for the client while there was something left to send.

    From when every slot has had a request until the last request is sent. A slot waits for the client from when a request
    was wanted in it (the answer before had ended, or its user had thought) until that is sent. 1 when there are no more
    requests than slots, since all are sent at once. None when none was sent.
    """
    sent = sorted(s.sent for s in spans if s.sent == s.sent)
    if not sent:
        return None
    if len(sent) <= slots or sent[-1] <= sent[slots - 1]:
        return 1.0
    begin, end = sent[slots - 1], sent[-1]
    lost = sum(max(0.0, min(s.sent, end) - max(s.wanted, begin)) for s in spans if s.sent == s.sent)
    return 1.0 - lost / (slots * (end - begin))


def delivered_open(spans: Sequence[Span]) -> float | None:
    """Return the rate sent as a share of the rate wanted: span of the due times over span of the sending times."""
    sent = [s for s in spans if s.sent == s.sent]
    if not sent:
        return None
    wanted = max(s.wanted for s in sent) - min(s.wanted for s in sent)
    took = max(s.sent for s in sent) - min(s.sent for s in sent)
    return wanted / took if took > 0 and wanted > 0 else 1.0
