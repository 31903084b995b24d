"""What one run says of itself: its figures and how far their noise goes, from its requests.

Requests of one run share batches and queues, so the units are the 20 runs of requests that were sent one after the other
(`pdbench.intervals.batches`). A figure's variance is that of the delete-a-batch jackknife (Shao and Tu, "The Jackknife and
Bootstrap", section 2.3; for percentiles, deleting one in twenty is enough for it to be consistent), widened as
`pdbench.intervals` does where neighbouring batches are alike. Throughput and goodput
are no means over requests: theirs comes from 20 equal spans of the run's time. All of it is on the log scale, so that
variances are of *relative* differences.

Two runs that were sent the same requests in the same order are a pair: the same batch is deleted from both, and what
their prompts have in common leaves the difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pdbench import intervals
from pdbench.intervals import Floats, Ints
from pdbench.records import MEASURE, NOT_REPORTED

#: degrees of freedom that a variance of 20 batches has
DF = intervals.BATCHES - 1
#: what makes two requests the same; runs made before conversations lack the last two
_TOLD = ("index", "prompt_tokens_asked", "output_tokens_asked", "conversation", "turn")
_COLUMNS = [
    *("point", "phase", *_TOLD, "ok", "sent_s", "first_s", "end_s", "chunk_s", "prompt_tokens", "output_tokens"),
]


@dataclass(frozen=True)
class Requests:
    """The good measured requests of a load point, in the order of their index; times in s.

    ``asked`` are index, lengths asked for, conversation and turn of *all* measured requests: what makes two runs a pair.
    ``batch``: the batch of each good request. ``gaps``, ``gap_batch``: every gap between output events, in s, and its batch.
    """

    asked: Ints
    batch: Ints
    sent: Floats
    first: Floats
    end: Floats
    inputs: Floats
    outputs: Floats
    gaps: Floats
    gap_batch: Ints
    slo: dict[str, float] = field(default_factory=dict)


def read(folder: Path, point: int, slo: dict[str, float] | None = None) -> Requests:
    """Read the requests of a run's load point; raise OSError or ValueError when requests.parquet is missing or no such file."""
    path = folder / "requests.parquet"
    names = set(pq.read_schema(path).names)
    rows = pq.read_table(path, columns=[name for name in _COLUMNS if name in names])
    rows = _measured(rows, point)

    def numbers(name: str) -> Floats:
        return np.asarray(rows[name].to_numpy(), dtype=np.float64)

    ok = rows["ok"].to_numpy().astype(bool)
    batch = intervals.batches(len(rows))
    chunks = rows["chunk_s"].combine_chunks()
    counts = chunks.value_lengths().to_numpy()
    owner = np.repeat(np.arange(len(rows)), counts)
    times = chunks.flatten().to_numpy()
    inner = (owner[1:] == owner[:-1]) & ok[owner[1:]]
    inputs, outputs = numbers("prompt_tokens"), numbers("output_tokens")
    inputs = np.where(inputs == NOT_REPORTED, numbers("prompt_tokens_asked"), inputs)
    outputs = np.where(outputs == NOT_REPORTED, counts, outputs)
    return Requests(
        _told(rows),
        batch[ok],
        numbers("sent_s")[ok],
        numbers("first_s")[ok],
        numbers("end_s")[ok],
        inputs[ok],
        outputs[ok],
        np.diff(times)[inner],
        batch[owner[1:][inner]],
        slo or {},
    )


def asked(folder: Path, point: int) -> Ints:
    """Return what `Requests.asked` would be, without the times; raise as `read` does."""
    path = folder / "requests.parquet"
    names = set(pq.read_schema(path).names)
    rows = pq.read_table(path, columns=[name for name in ("point", "phase", *_TOLD) if name in names])
    return _told(_measured(rows, point))


def _measured(rows: pa.Table, point: int) -> pa.Table:
    mask = pc.and_(pc.equal(rows["point"], point), pc.equal(rows["phase"], MEASURE))
    return rows.filter(mask).sort_by("index")


def _told(rows: pa.Table) -> Ints:
    there = set(rows.column_names)
    columns = [rows[name].to_numpy() if name in there else np.zeros(len(rows)) for name in _TOLD]
    return np.stack(columns, axis=1).astype(np.int64)


def _values(run: Requests, metric: str) -> tuple[Floats, Ints]:
    """Return the values of a latency (ms) or of tok_s_user (tokens/s), and their batches."""
    if metric == "itl_ms":
        return run.gaps * 1000, run.gap_batch
    e2e = run.end - run.sent
    if metric == "tok_s_user":
        return run.outputs / e2e, run.batch
    if metric == "tpot_ms":
        more = run.outputs > 1
        return 1000 * (run.end - run.first)[more] / (run.outputs[more] - 1), run.batch[more]
    return 1000 * (e2e if metric == "e2e_ms" else run.first - run.sent), run.batch


def _amounts(run: Requests, name: str) -> Floats:
    if name == "goodput_per_gpu":
        good = np.ones(len(run.sent), dtype=bool)
        tpot = 1000 * (run.end - run.first) / np.maximum(run.outputs - 1, 1)
        measures = {"ttft_ms": 1000 * (run.first - run.sent), "e2e_ms": 1000 * (run.end - run.sent), "tpot_ms": tpot}
        for metric, limit in run.slo.items():
            good &= measures[metric] <= limit
        return good.astype(np.float64)
    return {"output": run.outputs, "input": run.inputs, "request": np.ones(len(run.sent))}[name.split("_")[0]]


def replicates(run: Requests, metric: str) -> tuple[Floats, bool]:
    """Return 20 logs of a figure, each without one batch, and whether they pair with those of a run of the same requests.

    ``metric`` is as `pdbench.compare.figures` names it. Empty when the requests do not suffice (fewer than 20, or a figure
    of 0, which has no logarithm).
    """
    if len(run.sent) < intervals.BATCHES:
        return np.empty(0), False
    if metric.endswith("_per_gpu"):
        edges = np.linspace(run.sent.min(), run.end.max(), intervals.BATCHES + 1)[:, None]
        # Each request's share is spread over the time it was worked on: all of it at its end would add noise of its own.
        begin, end = {"output": (run.first, run.end), "input": (run.sent, run.first)}.get(
            metric.split("_")[0], (run.sent, run.end)
        )
        done = np.clip((edges - begin) / np.maximum(end - begin, 1e-9), 0.0, 1.0)
        amounts = np.diff(done @ _amounts(run, metric))
        rest = (amounts.sum() - amounts) / (intervals.BATCHES - 1)
        return (np.log(rest), False) if (rest > 0).all() else (np.empty(0), False)
    name, _, statistic = metric.rpartition("_") if metric != "tok_s_user" else (metric, "", "mean")
    values, batch = _values(run, name)
    if np.unique(batch).size < intervals.BATCHES:
        return np.empty(0), False
    if statistic == "mean":
        sums, sizes = np.bincount(batch, weights=values), np.bincount(batch)
        left = (sums.sum() - sums) / (sizes.sum() - sizes)
    else:
        share = int(statistic.removeprefix("p")) / 100
        order = np.argsort(values, kind="stable")
        values, batch = values[order], batch[order]
        left = np.array([_quantile(values[batch != b], share) for b in range(intervals.BATCHES)])
    return (np.log(left), True) if (left > 0).all() else (np.empty(0), False)


def _quantile(ordered: Floats, share: float) -> float:
    """Return what np.quantile does, of values that are sorted already."""
    place = (ordered.size - 1) * share
    low = int(place)
    high = min(low + 1, ordered.size - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))


def variance(replicated: Floats, by_requests: bool) -> float:
    """Return the jackknife's variance from its replicates; NaN when there are none.

    It is widened where neighbours are alike, ``by_requests``: spans of time share the requests under way anyway.
    """
    if not replicated.size:
        return math.nan
    off = replicated - replicated.mean()
    plain = float((replicated.size - 1) / replicated.size * (off @ off))
    return plain * intervals.widening(replicated) if by_requests else plain
