"""Checks on the KV cache: did it move from prefill to decode, all of it, once for every answer?"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from pdbench.gate.check import Check, some
from pdbench.gate.counters import Moved, info, moved, scrape
from pdbench.gate.rundata import Point, RunData
from pdbench.metrics import input_tokens
from pdbench.records import Record

#: Bytes per prompt token of two workers or points differ by at most this share, beside what whole pages explain.
_ALIKE = 0.02
_NOT_APART = "aggregated workers move no KV cache"


def transfer_failures(run: RunData, point: Point) -> Check:
    """No KV transfer and no bootstrap failed on any worker."""
    if not run.disaggregated:
        return Check("kv-failures", True, point.index, _NOT_APART, {})
    faults, evidence = [], {}
    for worker in run.workers:
        name = worker["name"]
        ends = [scrape(point.evidence, end, name) for end in ("before", "after")]
        problem = next((end.error for end in ends if end.error), "")
        if problem:
            faults.append(f"cannot tell whether transfers failed: {problem}")
            continue
        for counter in run.engine.failures:
            before, after = (end.total(counter) or 0.0 for end in ends)
            if after != before:
                faults.append(f"{name}: {counter} moved by {after - before:g}")
                evidence[f"{name} {counter}"] = after - before
    return Check("kv-failures", not faults, point.index, some(faults, 3) or "no KV transfer failed", evidence)


def transferred(run: RunData, point: Point) -> Check:
    """At least one KV transfer ended well for every answer."""
    if not run.disaggregated:
        return Check("kv-transfer", True, point.index, _NOT_APART, {})
    counts = _transfers(run, point)
    total, answers = _sum(counts), len(point.answers)
    evidence = {"answers": answers, "transfers": {name: {"counter": c.counter, "moved": c.amount} for name, c in counts.items()}}
    problems = [change.problem for change in counts.values() if change.problem]
    because = f" ({some(problems, 1)})" if problems and total < answers else ""
    message = f"the {run.engine.transfer_role} workers finished {total:g} KV transfers for {answers} answers{because}"
    return Check("kv-transfer", total >= answers, point.index, message, evidence)


def moved_bytes(run: RunData, point: Point) -> Check:
    """As many bytes moved as the prompts imply: their tokens times the KV bytes of one, whole pages counted.

    Where the engine does not tell its KV bytes per token, they are taken from the run itself: every worker and every load
    point must then agree on them.
    """
    if not run.disaggregated:
        return Check("kv-bytes", True, point.index, _NOT_APART, {})
    names = _movers(run)
    sizes = {name: moved(point.evidence, name, (run.engine.transferred,)) for name in names}
    moved_total = _sum(sizes) * run.engine.transfer_unit
    page = _page(run, point)
    tokens = sum(_paged(record, page) for record in point.answers)
    evidence: dict[str, Any] = {
        "bytes": moved_total,
        "prompt_tokens": tokens,
        "page_size": page,
        "bytes_per_prompt_token": moved_total / tokens if tokens else None,
    }
    problems = [size.problem for size in sizes.values() if size.problem]
    if len(problems) == len(sizes):
        # An engine without such a counter is not at fault; one that moved nothing shows none either.
        message = f"the size of the KV transfers is not known: {some(problems, 1)}"
        counted = _sum(_transfers(run, point)) > 0
        return Check("kv-bytes", counted, point.index, message, {**evidence, **({"caution": message} if counted else {})})
    told = {info(point.evidence, "after", name).get("kv_bytes_per_token") for name in names}
    known = next((n for n in told if len(told) == 1 and isinstance(n, (int, float)) and not isinstance(n, bool) and n > 0), None)
    evidence["kv_bytes_per_token"] = known
    fault = _alike(run, point, evidence) if known is None else _as_told(run, point, moved_total, tokens * known, page * known)
    per_token = f"{moved_total / tokens:,.0f}" if tokens else "no"
    message = f"{moved_total / 2**20:,.4g} MiB of KV cache moved for {tokens} prompt tokens, {per_token} bytes each"
    because = "the engine's own figure" if known is not None else "alike on all workers and load points"
    return Check("kv-bytes", not fault, point.index, f"{message}: {fault or because}", evidence)


def computed(run: RunData, point: Point) -> Check:
    """No decode worker computed a prompt itself."""
    if not run.disaggregated:
        return Check("decode-only", True, point.index, _NOT_APART, {})
    faults, evidence = [], {}
    allowed = run.engine.computed_allowed * len(point.answers)
    for worker in run.workers:
        if worker["role"] != "decode":
            continue
        name = worker["name"]
        ends = [scrape(point.evidence, end, name) for end in ("before", "after")]
        problem = next((end.error for end in ends if end.error), "")
        before, after = (end.total(run.engine.computed) or 0.0 for end in ends)
        evidence[name] = {"counter": run.engine.computed, "moved": None if problem else after - before}
        if problem:
            faults.append(f"cannot tell whether it computed prompts: {problem}")
        elif after - before > allowed:
            faults.append(f"{name} computed {after - before:g} prompt tokens itself")
    return Check("decode-only", not faults, point.index, some(faults, 3) or "no decode worker computed a prompt", evidence)


def _movers(run: RunData) -> list[str]:
    return [worker["name"] for worker in run.workers if worker["role"] == run.engine.transfer_role]


def _transfers(run: RunData, point: Point) -> dict[str, Moved]:
    return {name: moved(point.evidence, name, run.engine.transfers) for name in _movers(run)}


def _sum(changes: dict[str, Moved]) -> float:
    return sum(change.amount or 0.0 for change in changes.values())


def _page(run: RunData, point: Point) -> int:
    """Tokens that move together: the engine sends whole pages of its KV cache."""
    sizes = [info(point.evidence, "after", name).get("page_size") for name in _movers(run)]
    return max((size for size in sizes if isinstance(size, int) and size > 0), default=1)


def _paged(record: Record, page: int) -> int:
    return -(-input_tokens(record) // page) * page


def _as_told(run: RunData, point: Point, found: float, implied: float, page_bytes: float) -> str:
    """Transfers beyond one an answer (failed or repeated requests) may have moved as much as the longest prompt each."""
    surplus = max(0.0, _sum(_transfers(run, point)) - len(point.answers))
    longest = max((input_tokens(record) for record in (*point.warmup, *point.records)), default=0)
    most = implied + surplus * (implied / max(1, sum(map(input_tokens, point.answers))) * longest + page_bytes)
    if found < implied * 0.999:
        return f"fewer than the {implied / 2**20:,.4g} MiB that they imply"
    return f"more than the {most / 2**20:,.4g} MiB that they imply" if found > most * 1.001 else ""


def _alike(run: RunData, point: Point, evidence: dict[str, Any]) -> str:
    """Compare each worker of this point with the middle of all workers and points."""
    everywhere = {(p.index, name): figure for p in run.points for name, figure in _per_token(run, p)}
    if not everywhere:
        return "no worker counted a prompt token with them"
    here = {name: figure for (index, name), figure in everywhere.items() if index == point.index}
    shortest = min((input_tokens(record) for p in run.points for record in p.answers), default=1)
    share = _ALIKE + (_page(run, point) - 1) / max(1, shortest)
    middle = median(everywhere.values())
    evidence |= {"by_worker": here, "run_median": middle, "share_allowed": share}
    odd = [f"{name} {figure:,.0f}" for name, figure in here.items() if abs(figure - middle) > share * middle or figure <= 0]
    return f"{some(odd)} bytes per prompt token, the run's median is {middle:,.0f}" if odd else ""


def _per_token(run: RunData, point: Point) -> Iterator[tuple[str, float]]:
    """Bytes that a worker counted as moved, over the prompt tokens that it counted itself."""
    for name in _movers(run):
        size = moved(point.evidence, name, (run.engine.transferred,)).amount
        tokens = moved(point.evidence, name, (run.engine.prompt_tokens,)).amount
        if size is not None and tokens:
            yield name, size * run.engine.transfer_unit / tokens
