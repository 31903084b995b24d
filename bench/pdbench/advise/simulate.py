"""One simulated run of a layout under a load: its figures as a measured run has them, and what each stage was doing."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pdbench.advise.layout import Layout, build
from pdbench.load.requests import Load
from pdbench.load.trace import Row
from pdbench.metrics import Slo
from pdbench.model.cluster import Outcome, Prompt, Simulation
from pdbench.model.profile import Profile
from pdbench.model.scheduler import Step, Worker

#: a trace is drawn anew within spans of so many seconds, so that its slow swings stay
SPAN_S = 60.0


@dataclass(frozen=True)
class Work:
    """What is sent, by itself: requests in the order of sending, in a closed loop of ``concurrency`` or (None) when due."""

    prompts: tuple[Prompt, ...]
    concurrency: int | None
    slo: Slo = field(default_factory=Slo)


@dataclass(frozen=True)
class Stage:
    """What one stage was doing.

    ``busy``: share of the run that it was at work (of the KV memory: share in use), the mean over its workers; ``most``: of
    the busiest one (of the memory: its highest share); ``wait_ms``: what a request waited for it in the mean; ``batch``:
    requests in a decode step.
    """

    busy: float = 0.0
    most: float = 0.0
    wait_ms: float = 0.0
    batch: float = 0.0


@dataclass(frozen=True)
class Simulated:
    """``figures`` by the names of the tidy table (and of `pdbench.compare.judge.FIGURES`); ``stages`` by `layout.STAGES`.

    ``queued``: the share of TTFT that requests spent in queues.
    """

    figures: dict[str, float]
    stages: dict[str, Stage]
    queued: float
    refused: str = ""


def work(load: Load, slo: Slo, number: int) -> Work:
    """Return what the ``number``-th seed sends, from 0; of a trace that is replayed, 0 is the trace itself."""
    own = replace(load, seed=load.seed + number)
    if load.replay is not None and number:
        rows = redrawn(load.rows[: load.count], random.Random(f"{load.seed}/{number}/redrawn"))
        own = replace(own, rows=rows, count=len(rows))
    prompts = tuple(Prompt(r.isl, r.osl, r.due_s or 0.0) for r in own.measured())
    return Work(prompts, load.concurrency, slo)


def redrawn(rows: Sequence[Row], rng: random.Random, times: float = 1.0) -> list[Row]:
    """Return another trace of the same kind: in every minute as many requests as a Poisson draw says, of that minute's.

    So it has the trace's slow swings, and another chance in small. ``times``: as many requests, on average.
    """
    spans: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        spans[int(row.arrival_s // SPAN_S)].append(row)
    last = rows[-1].arrival_s
    found = []
    for number, members in sorted(spans.items()):
        begin = number * SPAN_S
        length = min(SPAN_S, max(last - begin, 1e-3))
        for _ in range(_poisson(len(members) * times, rng)):
            found.append(replace(rng.choice(members), arrival_s=begin + rng.random() * length))
    return sorted(found or rows, key=lambda row: row.arrival_s)


def _poisson(mean: float, rng: random.Random) -> int:
    count, at = 0, rng.expovariate(1.0)
    while at < mean:
        count, at = count + 1, at + rng.expovariate(1.0)
    return count


class Watch:
    """Counts what one worker does."""

    def __init__(self, worker: Worker) -> None:
        """Listen to it."""
        self.worker = worker
        worker.on_step, worker.on_stage = self._step, self._stage
        self.prefill = self.decode = self.held = self.peak = 0.0
        self.steps = self.made = 0
        self.waits: dict[str, float] = defaultdict(float)
        self.requests = 0

    def _step(self, step: Step) -> None:
        took = step.end - step.start
        if step.kind == "prefill":
            self.prefill += took
        else:
            self.decode += took
            self.steps += 1
            self.made += step.requests
        share = self.worker.used / self.worker.limits.capacity
        self.held += share * took
        self.peak = max(self.peak, share)

    def _stage(self, name: str, seconds: float) -> None:
        self.waits[name] += seconds
        self.requests += name in ("prefill_forward", "decode_waiting")

    @property
    def front_end(self) -> float:
        """Return the seconds that the front-end process worked: on every request, its first token and the others."""
        own = self.worker.rates.profile.engine
        return (self.requests * own.frontend_us_per_request + (self.requests + self.made) * own.frontend_us_per_token) / 1e6


def simulate(
    layout: Layout, given: Work, profiles: Mapping[str, Profile], faster: Mapping[str, float] | None = None
) -> Simulated:
    """Run a layout under a load; ``faster`` as in `pdbench.advise.layout.rates_of`."""
    made = build(layout, profiles, faster)
    # Of the lists: workers that join later are watched by whoever lets them join.
    watches = {role: [Watch(w) for w in getattr(made, role)] for role in ("prefill", "decode", "aggregated")}
    run = Simulation(made)
    flying = given.concurrency
    outcomes = run.open_loop(given.prompts) if flying is None else run.closed_loop(given.prompts, flying)
    return summed(layout.gpus, outcomes, watches, given.slo)


def summed(gpus: int, outcomes: Sequence[Outcome], watches: Mapping[str, Sequence[Watch]], slo: Slo) -> Simulated:
    """Return the figures of a run, with `pdbench.metrics`' definitions."""
    good = [one for one in outcomes if one.tokens]
    refused = next((one.failed for one in outcomes if one.failed), "")
    if not good:
        return Simulated(dict.fromkeys(_NAMES, math.nan) | {"completed": 0.0, "failed": float(len(outcomes))}, {}, 0.0, refused)
    span = max(one.end for one in good) - min(one.sent for one in outcomes)
    ttft = np.array([one.ttft for one in good]) * 1e3
    e2e = np.array([one.end - one.sent for one in good]) * 1e3
    sizes = np.array([len(one.tokens) for one in good])
    gaps = np.concatenate([np.empty(0), *(np.diff(one.tokens) for one in good)]) * 1e3
    tpot = (e2e - ttft)[sizes > 1] / (sizes[sizes > 1] - 1)
    figures = {
        "completed": float(len(good)),
        "failed": float(len(outcomes) - len(good)),
        "duration_s": span,
        "request_throughput": len(good) / span,
        "output_throughput": float(sizes.sum()) / span,
        "goodput": _goodput(ttft, e2e, sizes, slo) / span if slo else math.nan,
        **_statistics("ttft_ms", ttft),
        **_statistics("itl_ms", gaps),
        **_statistics("tpot_ms", tpot),
        **_statistics("e2e_ms", e2e),
    }
    for name in ("request_throughput", "output_throughput", "goodput"):
        figures[f"{name}_per_gpu"] = figures[name] / gpus
    stages = _stages(watches, span, float(np.mean([one.memory_wait for one in good])) * 1e3, len(good))
    queues = stages["prefill"].wait_ms + stages["KV memory"].wait_ms + stages["decode"].wait_ms
    return Simulated(figures, stages, min(1.0, queues / float(ttft.mean())), refused)


_STATISTICS = ("mean", "p50", "p90", "p95", "p99")
_NAMES = (
    *("duration_s", "request_throughput", "output_throughput", "goodput"),
    *("request_throughput_per_gpu", "output_throughput_per_gpu", "goodput_per_gpu"),
    *(f"{metric}_{one}" for metric in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms") for one in _STATISTICS),
)


def _statistics(name: str, values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> dict[str, float]:
    if not values.size:
        return {f"{name}_{one}": math.nan for one in _STATISTICS}
    found = [values.mean(), *np.percentile(values, [50, 90, 95, 99])]
    return {f"{name}_{one}": float(value) for one, value in zip(_STATISTICS, found, strict=True)}


def _goodput(
    ttft: np.ndarray[tuple[int], np.dtype[np.float64]],
    e2e: np.ndarray[tuple[int], np.dtype[np.float64]],
    sizes: np.ndarray[tuple[int], np.dtype[np.int64]],
    slo: Slo,
) -> float:
    """Return how many requests met every limit; TPOT of a one-token answer counts as 0."""
    tpot = (e2e - ttft) / np.maximum(sizes - 1, 1)
    met = np.ones(len(ttft), dtype=bool)
    for values, limit in ((ttft, slo.ttft_ms), (tpot, slo.tpot_ms), (e2e, slo.e2e_ms)):
        if limit is not None:
            met &= values <= limit
    return float(met.sum())


def _stages(watches: Mapping[str, Sequence[Watch]], span: float, memory_ms: float, requests: int) -> dict[str, Stage]:
    computing = [*watches["prefill"], *watches["aggregated"]]
    decoding = [*watches["decode"], *watches["aggregated"]]
    everyone = [*watches["prefill"], *decoding]

    def wait(group: Sequence[Watch], stage: str) -> float:
        return sum(one.waits[stage] for one in group) / requests * 1e3

    def stage(busy: Sequence[float], wait_ms: float = 0.0, batch: float = 0.0) -> Stage:
        shares = [one / span for one in busy] or [0.0]
        return Stage(sum(shares) / len(shares), max(shares), wait_ms, batch)

    # From the grant of memory to the KV's arrival, less what prefill took of it.
    moved = wait(decoding, "decode_transferred") - sum(
        wait(watches["prefill"], one) for one in ("prefill_waiting", "prefill_forward")
    )
    steps = sum(one.steps for one in decoding)
    held = [one.held / max(one.prefill + one.decode, 1e-9) for one in decoding]
    return {
        "prefill": stage([one.prefill for one in computing], wait(computing, "prefill_waiting")),
        "decode": stage(
            [one.decode for one in decoding],
            wait(decoding, "decode_waiting"),
            sum(one.made for one in decoding) / steps if steps else 0.0,
        ),
        "KV link": stage([max(one.worker.link_busy.values(), default=0.0) for one in everyone], max(0.0, moved)),
        "KV memory": Stage(sum(held) / len(held), max(one.peak for one in decoding), memory_ms),
        "front end": stage([one.front_end for one in everyone]),
    }
