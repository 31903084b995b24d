"""Where the time to the first token goes: the client's mean TTFT, split by what servers say of the same requests.

Every server keeps histograms; between two snapshots their sums and counts move by exactly the requests in between, so the
mean of a stage over the window needs no sampling. A stage is ``sum / max(count, requests)``: one that only some requests go
through counts for its share, one that several ranks report counts once. A stage that nobody reports is None, never 0, and its
time is in the rest. The rest is the client's mean less all stages: tokenisation, intervals of polling, and what engines do
not time.

``router`` is the time outside the engines: from the router's own TTFT where it measures one, else from the client's (network
and client included), less the time that the engines were busy with the request. ``prefill_answer`` is what decode had to say and
the router kept back until prefill had answered, too: by means, so answers that are late now and then show less; 0 where the
client had its first token in less time than prefill took (a router that does not wait).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdbench import metrics
from pdbench.engines import ROUTER_TTFT, Engine, Stage, Stages, Timer, engine_of, total
from pdbench.records import MEASURE, Record

Json = dict[str, Any]
#: stage -> its name for a reader; in the order of the figure
NAMES = {
    "router": "router and network",
    "bootstrap": "bootstrap",
    "prefill_queue": "prefill queue",
    "prefill_forward": "prefill",
    "kv_allocation": "KV allocation",
    "kv_transfer": "KV transfer",
    "decode_queue": "decode queue",
    "first_step": "first step",
    "prefill_answer": "prefill's answer",
}
#: times of which one is at most so much longer are taken for the same
_ALIKE = 1.1
#: stages that are there only where prefill and decode are apart
_APART = ("bootstrap", "kv_allocation", "kv_transfer", "decode_queue", "first_step", "prefill_answer")


@dataclass(frozen=True)
class Mean:
    """The mean of one histogram over the window, seconds for each request; ``samples`` is how many values it had."""

    seconds: float
    samples: int
    name: str


def attribute(entry: Mapping[str, Any], records: Iterable[Record]) -> Json | None:
    """Return ``attribution`` of a load point; None without evidence, without an answer, or where no stage is reported.

    ``entry`` is the point's entry in evidence.json. Its window is from ``begin`` (after the warm-up) where that was taken,
    else from ``before``, and the warm-up's requests then belong to it. Keys: ``requests``, ``warmup`` (whether it is part of
    it), ``ttft_ms``, ``stages`` (``stage``, ``ms``, ``samples``, ``source``), ``rest_ms``.
    """
    since = "begin" if isinstance(entry.get("begin"), dict) else "before"
    answers = [r for r in records if r.ok and (since == "before" or r.phase == MEASURE)]
    after = entry.get("after")
    if not answers or not isinstance(after, dict) or not isinstance(entry.get(since), dict):
        return None
    workers = {name: (_page(entry[since], name), _page(after, name)) for name in after.get("workers", {})}
    engine = engine_of([sample for _, page in workers.values() for sample in page])
    if engine is None or not all(begin and end for begin, end in workers.values()):
        return None
    ttft = sum(map(metrics.ttft_s, answers)) / len(answers)
    parts = _parts(engine, workers, len(answers))
    outside = _outside(entry, since, _stages(engine, workers), workers, ttft, len(answers))
    stages = [_router(outside, parts), *parts]
    known = [row["ms"] for row in stages if row["ms"] is not None]
    if not known:
        return None
    return {
        "requests": len(answers),
        "warmup": since == "before",
        "ttft_ms": 1000 * ttft,
        "stages": stages,
        "rest_ms": 1000 * ttft - sum(known),
    }


#: a worker's or router's samples at both ends of the window
Pages = tuple[Mapping[str, float], Mapping[str, float]]
Workers = Mapping[str, Pages]


def _page(side: Mapping[str, Any], worker: str) -> Mapping[str, float]:
    """Return a worker's metrics; empty where they were not read."""
    found: Mapping[str, float] = side["workers"].get(worker, {}).get("metrics") or {}
    return found


def _role(worker: str) -> str:
    return worker.rpartition("-")[0]


def _stages(engine: Engine, workers: Workers) -> Stages:
    return engine.apart if any(_role(name) == "prefill" for name in workers) else engine.together


def _parts(engine: Engine, workers: Workers, requests: int) -> list[Json]:
    stages = _stages(engine, workers)
    found = {part.name: part for part in stages.parts}
    rows = []
    for name in NAMES:
        if name == "router" or (name in _APART and stages is engine.together):
            continue
        if name == "prefill_answer" and name not in found:  # an engine whose roles take turns
            continue
        mean = _of_stage(workers, found[name], requests) if name in found else None
        rows.append(_row(name, mean.seconds, mean.samples, mean.name) if mean else _row(name, None, 0, ""))
    return rows


def _of_stage(workers: Workers, stage: Stage, requests: int) -> Mean | None:
    """Return the mean of a stage; None when one of its timers says nothing, or prefill's E2E, which it is a part of, does not."""
    means = [mean for timer in stage.times if (mean := _of_role(workers, timer, requests))]
    if len(means) < len(stage.times) or not all(_of_role(workers, timer, requests) for timer in stage.less if timer.whole):
        return None
    within = sum(mean.seconds for timer in stage.less if (mean := _of_role(workers, timer, requests)))
    # Means of two workers' clocks and requests: their difference can fall below nothing by a little.
    seconds = max(0.0, sum(mean.seconds for mean in means) - within)
    most = _of_stage(workers, stage.most, requests) if stage.most else None
    return Mean(
        min(seconds, most.seconds) if most else seconds,
        min(mean.samples for mean in means),
        " and ".join(mean.name for mean in means),
    )


def _router(outside: Mean | None, parts: list[Json]) -> Json:
    """Return the router's row. Of the time outside the engines, what it waited for prefill's answer is a stage of its own."""
    if outside is None:
        return _row("router", None, 0, "")
    left = outside.seconds
    for row in parts:
        if row["stage"] == "prefill_answer" and row["ms"] is not None:
            # Had it waited, it would have been longer: clearly, as the two means are not of quite the same requests.
            row["ms"] = min(row["ms"], 1000 * left) if row["ms"] <= _ALIKE * 1000 * left else 0.0
            left -= row["ms"] / 1000
    return _row("router", max(0.0, left), outside.samples, outside.name)


def _row(stage: str, seconds: float | None, samples: int, source: str) -> Json:
    return {"stage": stage, "ms": None if seconds is None else 1000 * seconds, "samples": samples, "source": source}


def _outside(entry: Mapping[str, Any], since: str, stages: Stages, workers: Workers, ttft: float, requests: int) -> Mean | None:
    """Return the time from the client's (or router's) first token that the engines were not busy for."""
    inside = [_of_role(workers, timer, requests) for timer in stages.inside]
    means = [mean for mean in inside if mean is not None]
    if not means or len(means) < len(inside):
        return None
    begin, end = (entry[side].get("router", {}).get("metrics") or {} for side in (since, "after"))
    own = _mean([(begin, end)], Timer("router", ROUTER_TTFT), requests)
    source = f"{own.name if own else 'TTFT of the client'} less {' and '.join(mean.name for mean in means)}"
    whole = own.seconds if own else ttft
    return Mean(whole - sum(mean.seconds for mean in means), min(mean.samples for mean in means), source)


def _of_role(workers: Workers, timer: Timer, requests: int) -> Mean | None:
    return _mean([pair for name, pair in workers.items() if _role(name) == timer.role], timer, requests)


def _mean(pairs: Sequence[Pages], timer: Timer, requests: int) -> Mean | None:
    """Return the mean of the first of the timer's histograms that moved; None when none did."""
    for name in timer.names:
        base, brace, labels = name.partition("{")
        sums, counts = ([_moved(pair, f"{base}{end}{brace}{labels}") for pair in pairs] for end in ("_sum", "_count"))
        seconds, count = (sum(moved or 0.0 for moved in ends) for ends in (sums, counts))
        if count > 0 and any(moved is not None for moved in sums):
            return Mean(timer.unit_s * seconds / max(count, requests), round(count), name)
    return None


def _moved(pages: Pages, counter: str) -> float | None:
    begin, end = pages
    now = total(end, counter)
    return None if now is None else now - (total(begin, counter) or 0.0)


def in_words(found: Mapping[str, Any]) -> str:
    """Return one sentence: the largest parts first, then what is not reported."""
    rows = [(NAMES[row["stage"]], row["ms"]) for row in found["stages"]]
    known = sorted(((ms, name) for name, ms in rows if ms is not None and ms >= 0.05), reverse=True)
    silent = [name for name, ms in rows if ms is None]
    parts = ", ".join(f"{name} {ms:.1f}" for ms, name in known)
    rest = f"{found['rest_ms']:.1f} ms unexplained"
    text = f"mean TTFT {found['ttft_ms']:.1f} ms: {parts + ' ms, ' if parts else ''}{rest}"
    return text + (f"; not reported: {', '.join(silent)}" if silent else "")
