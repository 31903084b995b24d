"""Load points that were measured, and the same in virtual time: one row of figures each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pdbench import shapes
from pdbench.advise import check
from pdbench.gate.rundata import NotARun
from pdbench.load.errors import LoadError
from pdbench.model.cluster import Deployment, Outcome, Prompt, Simulation, limits
from pdbench.model.profile import Profile
from pdbench.model.rates import Rates
from pdbench.model.scheduler import Worker
from pdbench.reading import json_of

#: what is compared, with its unit
FIGURES = {"output_throughput": "tok/s", "ttft_ms": "ms", "itl_ms": "ms", "e2e_ms": "ms"}


@dataclass(frozen=True)
class Case:
    """One load point: who served what, and how. ``requests``: (prompt, output) tokens in the order of sending.

    ``concurrency`` for a closed loop, else ``due``: seconds after the first request at which each was due. ``capacity`` and
    ``max_running``: a worker's limits where it said them (0: as the profile has them). ``measured``: means, by the names of
    `FIGURES`.
    """

    name: str
    ratio: str
    prefill: int
    decode: int
    aggregated: int
    tp_size: int
    transport: str
    requests: tuple[tuple[int, int], ...]
    concurrency: int | None
    due: tuple[float, ...]
    capacity: int
    max_running: int
    prefix_cache: bool
    measured: Mapping[str, float]
    emulated: bool = False

    @property
    def isl(self) -> float:
        """Return the mean prompt length in tokens."""
        return float(np.mean([isl for isl, _ in self.requests]))

    @property
    def osl(self) -> float:
        """Return the mean output length in tokens."""
        return float(np.mean([osl for _, osl in self.requests]))


def read(folder: Path) -> list[Case]:
    """Read every load point of a run's folder; raise LoadError for a folder that is none, or a run that is not valid."""
    try:
        plan = json_of((folder / "plan.json").read_text(encoding="utf-8"))
        summary = json_of((folder / "summary.json").read_text(encoding="utf-8"))
        verdict = json_of((folder / "validity.json").read_text(encoding="utf-8"))
        if why := next(filter(None, map(shapes.newer, (plan, summary, verdict))), ""):
            raise LoadError(f"{folder}: {why}")
        rows = pq.read_table(folder / "requests.parquet").to_pylist()
        if not verdict["valid"]:
            raise LoadError(f"{folder}: the run is INVALID (validity.json), and nothing is fitted to it")
        workers = _workers(plan)
        said = _limits(folder)
        points = summary["points"]
        return [_case(folder, number, point, plan, workers, said, rows) for number, point in enumerate(points)]
    except OSError as why:
        raise LoadError(f"{folder} is no folder of a judged run: {why.filename}: {why.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as why:
        if isinstance(why, LoadError):
            raise
        raise LoadError(f"{folder} is no run that can be read: {type(why).__name__} {why}") from None


def _workers(plan: Mapping[str, Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"prefill": [], "decode": [], "aggregated": []}
    for worker in plan["workers"]:
        found[worker["role"]].append(worker)
    return found


def _case(
    folder: Path,
    number: int,
    point: Mapping[str, Any],
    plan: Mapping[str, Any],
    workers: Mapping[str, list[Any]],
    said: tuple[int, int],
    rows: Sequence[Mapping[str, Any]],
) -> Case:
    mine = sorted((r for r in rows if r["point"] == number and r["phase"] == "measure"), key=lambda r: int(r["index"]))
    if not mine or not all(r["ok"] for r in mine):
        raise LoadError(f"{folder}: load point {number + 1} has failed requests, or none")
    sizes = tuple(
        (int(r["prompt_tokens"] if r["prompt_tokens"] > 0 else r["prompt_tokens_asked"]), int(r["output_tokens_asked"]))
        for r in mine
    )
    first = min(float(r["scheduled_s"]) for r in mine)
    ways = sorted({pair["expected_transport"] for pair in plan["pairs"]}) or ["cuda_ipc"]
    if len(ways) > 1:
        raise LoadError(f"{folder}: its pairs differ in transport ({', '.join(ways)}); fit runs of one way at a time")
    tensor = {len(rank["gpus"]) for worker in plan["workers"] for rank in worker["ranks"]}
    if len(tensor) > 1 or any(len(worker["ranks"]) > 1 for worker in plan["workers"]):
        raise LoadError(f"{folder}: workers of different sizes, or over several hosts, are not modelled")
    if point.get("shared_prefix"):
        raise LoadError(f"{folder}: load point {number + 1} shares prefixes, and what prefix caches save is not modelled")
    closed = point.get("concurrency")
    label = f"{int(np.mean([isl for isl, _ in sizes]))}/{int(np.mean([osl for _, osl in sizes]))}"
    return Case(
        name=f"{plan['ratio']} {label} {f'c={closed}' if closed else 'open'}",
        ratio=str(plan["ratio"]),
        prefill=len(workers["prefill"]),
        decode=len(workers["decode"]),
        aggregated=len(workers["aggregated"]),
        tp_size=tensor.pop() or 1,
        transport=ways[0],
        requests=sizes,
        concurrency=int(closed) if closed else None,
        due=() if closed else tuple(float(r["scheduled_s"]) - first for r in mine),
        capacity=said[0],
        max_running=said[1],
        # Caches are emptied before a point, and its prompts share nothing unless the workload says so.
        prefix_cache=False,
        # Answers of one token have no gaps: None, and nothing is fitted to that.
        measured={name: float((point[name] if name == "output_throughput" else point[name]["mean"]) or 0) for name in FIGURES},
        emulated=bool(plan.get("emulated")),
    )


def read_table(path: Path) -> list[Case]:
    """Read the valid load points of a tidy table (a sweep's results.csv); raise LoadError for one that is none.

    It has no requests: as many of the mean lengths are taken, in an open loop due at random.
    """
    try:
        return [of_row(row) for row in check.read(str(path))[0].to_dict("records")]
    except (OSError, ValueError, KeyError, TypeError, NotARun) as why:
        raise LoadError(f"{path} is no table of a sweep that can be read: {type(why).__name__}: {why}") from None


def of_row(row: Mapping[Any, Any]) -> Case:
    """Return a row of the tidy table as a case; raise ValueError where the table does not say enough."""
    layout, work = check.layout_of(dict(row), str), check.work_of(dict(row))
    spots = (*layout.prefill, *layout.decode, *layout.aggregated)
    sizes = tuple((prompt.prompt_tokens, prompt.output_tokens) for prompt in work.prompts)
    closed = work.concurrency
    found = {name: row[name if name == "output_throughput" else f"{name}_mean"] for name in FIGURES}
    return Case(
        name=f"{layout.ratio} {sizes[0][0]}/{sizes[0][1]} {f'c={closed}' if closed else 'open'}",
        ratio=layout.ratio,
        prefill=len(layout.prefill),
        decode=len(layout.decode),
        aggregated=len(layout.aggregated),
        tp_size=spots[0].gpus,
        transport=next(iter({way for ways in layout.ways for way in ways}), "cuda_ipc"),
        requests=sizes,
        concurrency=closed,
        due=() if closed else tuple(prompt.due for prompt in work.prompts),
        capacity=0,
        max_running=0,
        prefix_cache=False,
        measured={name: 0.0 if value != value or value is None else float(value) for name, value in found.items()},
        emulated=bool(row.get("emulated") is True),
    )


def transport_of(cases: Sequence[Case]) -> str:
    """Return the way that KV caches went; raise LoadError for several ways. Aggregated servers move none."""
    ways = sorted({case.transport for case in cases if case.decode})
    if len(ways) > 1:
        raise LoadError(f"the runs' KV caches went over {' and '.join(ways)}: take those of one way at a time")
    return ways[0] if ways else cases[0].transport


def _limits(folder: Path) -> tuple[int, int]:
    """Return the smallest KV cache in tokens and the fewest running requests that a worker said it has (0: did not say)."""
    try:
        points = json_of((folder / "evidence.json").read_text(encoding="utf-8"))["points"]
    except (OSError, ValueError, KeyError):
        return 0, 0
    infos = [worker["server_info"] for worker in points[0]["before"]["workers"].values()] if points else []
    memory = [int(info["max_total_num_tokens"]) for info in infos if info.get("max_total_num_tokens")]
    running = [int(info["max_running_requests"]) for info in infos if info.get("max_running_requests")]
    return min(memory, default=0), min(running, default=0)


def simulate(profile: Profile, case: Case) -> dict[str, float]:
    """Return what the model says of a load point: means, by the names of `FIGURES`."""
    rates = Rates(profile, case.tp_size)
    own = limits(rates, prefix_cache=case.prefix_cache)
    own = replace(own, capacity=case.capacity or own.capacity, max_running=case.max_running or own.max_running)

    def some(number: int) -> list[Worker]:
        return [Worker(rates, own) for _ in range(number)]

    cluster = Deployment(some(case.prefill), some(case.decode), some(case.aggregated), lambda here, there: case.transport)
    if case.concurrency is not None:
        found = Simulation(cluster).closed_loop([Prompt(isl, osl) for isl, osl in case.requests], case.concurrency)
    else:
        prompts = [Prompt(isl, osl, due) for (isl, osl), due in zip(case.requests, case.due, strict=True)]
        found = Simulation(cluster).open_loop(prompts)
    return figures(found)


def figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the means of finished requests as SGLang defines them; throughput from the first sent to the last token."""
    done = [outcome for outcome in outcomes if not outcome.failed]
    if not done:
        raise LoadError(f"the model serves none of these requests: {outcomes[0].failed}")
    gaps = [np.diff(outcome.tokens) for outcome in done if len(outcome.tokens) > 1]
    lasts = max(outcome.end for outcome in done) - min(outcome.sent for outcome in done)
    return {
        "output_throughput": sum(len(outcome.tokens) for outcome in done) / lasts,
        "ttft_ms": 1e3 * float(np.mean([outcome.ttft for outcome in done])),
        "itl_ms": 1e3 * float(np.mean(np.concatenate(gaps))) if gaps else 0.0,
        "e2e_ms": 1e3 * float(np.mean([outcome.end - outcome.sent for outcome in done])),
    }
