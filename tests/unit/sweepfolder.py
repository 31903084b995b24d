"""Synthetic sweeps: run folders whose latencies follow a simple law of ratio and load, so that the best ratio is known."""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Collection, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from unit.runfolder import KV_BYTES, Run, good

from pdbench.attribution import attribute
from pdbench.evidence import write_metrics
from pdbench.gate import calibrated as calibrated_check
from pdbench.records import Record

Json = dict[str, Any]
#: seconds of prefill for each prompt token of one worker; of one decode step, and more of it for each request in the batch
PREFILL_S, STEP_S, EACH_S = 60e-6, 0.008, 0.0004


def workers(ratio: str) -> tuple[int, int]:
    """Prefill and decode workers; an aggregated one counts as both, at less than full speed (see `times`)."""
    if ratio.endswith("agg"):
        count = int(ratio.removesuffix("agg") or 1)
        return count, count
    prefill, decode = ratio.removesuffix("d").split("p")
    return int(prefill), int(decode)


def times(ratio: str, concurrency: int, isl: int, osl: int) -> tuple[float, float, float]:
    """TTFT, seconds of it spent in prefill itself, and ITL of a closed loop in its steady state, in seconds."""
    prefill, decode = workers(ratio)
    together = 1.35 if ratio.endswith("agg") else 1.0
    work = isl * PREFILL_S * together
    itl = (STEP_S + EACH_S * concurrency / decode) * together
    cycle = max(work + osl * itl, concurrency * work / prefill)
    return cycle - osl * itl + 0.004, work, itl


def spread(run: Run, point: int, ratio: str, asked: Json, rng: random.Random, noise: float, drift: float) -> None:
    """Give the measured requests of a point the times of `times`, as a closed loop would have sent them."""
    concurrency, osl = asked["concurrency"], int(asked["osl"])
    ttft, _, itl = (value * drift for value in times(ratio, concurrency, int(asked["isl"]), osl))
    slots = [0.0] * concurrency
    for record in run.measured(point):
        start = heapq.heappop(slots)
        first = start + ttft * rng.lognormvariate(0, noise)
        record.scheduled_s, record.sent_s, record.first_s = start, start + 0.0001, first
        record.chunk_s = list(accumulate([itl * rng.lognormvariate(0, noise)] * (osl - 1), initial=first))
        record.end_s = record.chunk_s[-1]
        heapq.heappush(slots, record.end_s + 0.0002)


def tell(run: Run, point: int, ratio: str, asked: Json) -> None:
    """Let the servers say how long the stages of these requests took."""
    if ratio.endswith("agg"):
        return
    answers = [r for r in run.records if r.point == point and r.ok]
    _, work, _ = times(ratio, asked["concurrency"], int(asked["isl"]), int(asked["osl"]))
    wait = sum(r.first_s - r.sent_s for r in answers) / len(answers)
    stages = {"prefill_forward": 0.9 * work, "prefill_transfer_kv_cache": 0.1 * work}
    for end in ("before", "after"):
        many = len(answers) if end == "after" else 0
        for name, entry in run.side(end, point)["workers"].items():
            metrics = entry["metrics"]
            if name == "prefill-0":
                for stage, seconds in stages.items():
                    metrics[f'sglang:per_stage_req_latency_seconds_sum{{stage="{stage}"}}'] = many * seconds
                    metrics[f'sglang:per_stage_req_latency_seconds_count{{stage="{stage}"}}'] = float(many)
                metrics["sglang:queue_time_seconds_sum"] = many * max(0.0, wait - work - 0.004)
                metrics["sglang:queue_time_seconds_count"] = float(many)
            if name == "decode-0":
                metrics["sglang:time_to_first_token_seconds_sum"] = many * (wait - 0.002)
                metrics["sglang:time_to_first_token_seconds_count"] = float(many)


def kv_rows(point: int, records: Sequence[Record]) -> list[tuple[int, float, str, str, str, float]]:
    """What scrapes of the prefill workers' transfer counter saw, ten in the point."""
    end = max(r.end_s for r in records)
    ticks = [end * i / 10 for i in range(11)]
    done = [sum(r.prompt_tokens_asked for r in records if r.first_s <= t) * KV_BYTES / 2**20 for t in ticks]
    return [(point, t, "prefill-0", "sglang:kv_transfer_total_mb_sum", "", mb) for t, mb in zip(ticks, done, strict=True)]


def sweep(
    folder: Path,
    ratios: Sequence[str] = ("2agg", "1p1d"),
    shapes: Sequence[tuple[int, int]] = ((64, 6),),
    concurrency: Sequence[int] = (2, 8),
    repeats: int = 2,
    num_requests: int = 24,
    noise: float = 0.02,
    drift: float = 0.01,
    emulated: bool = False,
    calibrated: bool = True,
    invalid: Collection[tuple[str, int]] = (),
    seed: int = 1,
) -> Path:
    """Write a sweep's folder; ``invalid``: (cell id, repeat) of the runs that the gate refused."""
    rng = random.Random(seed)
    cells = [(f"{ratio}-{isl}x{osl}", ratio, isl, osl) for ratio in ratios for isl, osl in shapes]
    listed = []
    for cell, ratio, isl, osl in cells:
        variables = {"ratio": ratio, "bench_input_len": isl, "bench_output_len": osl}
        listed.append({"id": cell, "variables": variables, "deploy": {"ratio": ratio}, "load": {"bench_input_len": isl}})
    for repeat in range(1, repeats + 1):
        for cell, ratio, isl, osl in cells:
            run = good(ratio, concurrency, (), num_requests, osl, isl, emulated, seed=repeat)
            slow = 1 + rng.uniform(-drift, drift)
            rows = []
            for point, asked in enumerate(run.asked):
                spread(run, point, ratio, asked, rng, noise, slow)
                tell(run, point, ratio, asked)
                rows += kv_rows(point, run.measured(point)) if not ratio.endswith("agg") else []
            place = run.write(folder / "runs" / cell / f"r{repeat}a1")
            summary = json.loads((place / "summary.json").read_text())
            for point, entry in enumerate(summary.get("points") or [summary]):
                of_point = [r for r in run.records if r.point == point]
                entry["attribution"] = attribute(run.evidence["points"][point], of_point)
            (place / "summary.json").write_text(json.dumps(summary))
            write_metrics(place / "server_metrics.parquet", rows)
            valid = (cell, repeat) not in invalid
            checks = [
                *(
                    {"id": calibrated_check.ID, "ok": True, "point": point, "message": "good", "evidence": {"selfcheck": {}}}
                    for point in range(len(run.asked) if calibrated else 0)
                ),
                {"id": "kv", "ok": valid, "point": None, "message": "the KV cache did not move", "evidence": {}},
            ]
            (place / "validity.json").write_text(json.dumps({"schema": 1, "valid": valid, "checks": checks}))
    about = {
        "schema": 1,
        "name": folder.name,
        "inventory": "inventory/local",
        "spec": {"grid": {}},
        "created": "",
        "cells": listed,
    }
    (folder / "sweep.json").write_text(json.dumps({**about, "order": [[c["id"], r + 1] for r in range(repeats) for c in listed]}))
    return folder
