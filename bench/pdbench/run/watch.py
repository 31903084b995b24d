"""What the client knows about itself: did it keep up, and what did it cost?"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter, process_time

from pdbench.metrics import Stats, stats

_TICK_S = 0.01


@dataclass(slots=True)
class Span:
    """One request from the sender's side: wanted, sent and ended, `perf_counter` seconds (sent NaN: never)."""

    wanted: float
    sent: float
    ended: float


@dataclass(slots=True)
class Watch:
    """Measures the client during one phase: CPU time, event-loop lag, lateness, load delivered."""

    spans: list[Span] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    reads: int = 0
    digest_cpu_s: float = 0.0
    own_cpu_s: float = 0.0
    _cpu_start: float = 0.0

    def begin(self) -> None:
        """Start the CPU clock."""
        self._cpu_start = process_time()

    async def tick(self) -> None:
        """Measure, until cancelled, how much later than asked a timer of 10 ms fires."""
        while True:
            before = perf_counter()
            await asyncio.sleep(_TICK_S)
            self.lags.append(max(0.0, perf_counter() - before - _TICK_S))

    def stop(self) -> None:
        """Stop the CPU clock."""
        self.own_cpu_s = process_time() - self._cpu_start

    def report(self, tokens: int, events: int, delivered: float | None) -> dict[str, object]:
        """Return ``client`` of summary.json; ``tokens`` and ``events`` are sums over the good requests.

        ``cpu_s`` counts the sending and the digesting process.
        """
        late = [s.sent - s.wanted for s in self.spans if s.sent == s.sent]
        return {
            "cpu_s": self.own_cpu_s + self.digest_cpu_s,
            "loop_lag_ms": brief(self.lags),
            "send_lateness_ms": brief(late),
            "tokens_per_event": tokens / events if events else None,
            "events_per_read": events / self.reads if self.reads else None,
            "delivered_load": delivered,
        }


#: ``client`` of a point whose sender is gone (a recovered run): the keys stay, nothing is known
UNKNOWN: dict[str, object] = {
    "cpu_s": None,
    "loop_lag_ms": {"p50": None, "p99": None, "max": None},
    "send_lateness_ms": {"p50": None, "p99": None, "max": None},
    "tokens_per_event": None,
    "events_per_read": None,
    "delivered_load": None,
}


def brief(seconds: Sequence[float]) -> Stats:
    """Return p50, p99 and max in milliseconds."""
    full = stats(1000 * s for s in seconds)
    return {name: full[name] for name in ("p50", "p99", "max")}


def delivered_closed(spans: Sequence[Span], slots: int) -> float | None:
    """Return the mean share of ``slots`` that were busy while there was something left to send.

    From when every slot has had a request until the last request is sent; 1 when there are no more requests than
    slots, since all are sent at once. None when none was sent.
    """
    sent = sorted(s.sent for s in spans if s.sent == s.sent)
    if not sent:
        return None
    if len(sent) <= slots or sent[-1] <= sent[slots - 1]:
        return 1.0
    begin, end = sent[slots - 1], sent[-1]
    busy = sum(max(0.0, min(s.ended, end) - max(s.sent, begin)) for s in spans if s.sent == s.sent)
    return busy / (slots * (end - begin))


def delivered_open(spans: Sequence[Span]) -> float | None:
    """Return the rate sent as a share of the rate wanted: span of the due times over span of the sending times."""
    sent = [s for s in spans if s.sent == s.sent]
    if not sent:
        return None
    wanted = max(s.wanted for s in sent) - min(s.wanted for s in sent)
    took = max(s.sent for s in sent) - min(s.sent for s in sent)
    return wanted / took if took > 0 and wanted > 0 else 1.0
