"""A ranking in words, as JSON, and what a profile's figures rest on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pdbench.advise.layout import STAGES
from pdbench.advise.rank import FASTER, LEAST_DIFFERENCE, Estimate, Ranked
from pdbench.load.requests import Load
from pdbench.metrics import Slo
from pdbench.model.profile import ORIGINS, Profile

Json = dict[str, Any]
GOALS = {"goodput_per_gpu": "requests/s within the limits, per GPU", "output_throughput_per_gpu": "output tokens/s per GPU"}
#: figures named when a profile says what it rests on
_SHOWN = 9
IN_JSON = (
    *("goodput_per_gpu", "output_throughput_per_gpu", "request_throughput", "output_throughput"),
    *("ttft_ms_mean", "ttft_ms_p50", "ttft_ms_p99", "itl_ms_mean", "itl_ms_p99", "tpot_ms_mean", "e2e_ms_mean", "e2e_ms_p99"),
)


def grounds(profile: Profile) -> str:
    """Say how many of a profile's figures were measured, published, and so on."""
    origins = Counter(source.split(":")[0].split()[0] for source in profile.sources.values())
    counted = ", ".join(f"{origins[origin]} {origin}" for origin in ORIGINS if origins[origin])
    speed = [name for name in profile.sources if name.startswith(("engine.", "transports."))]
    guessed = [name.split(".", 1)[1] for name in speed if profile.sources[name].startswith("chosen")]
    some = ", ".join(guessed[:_SHOWN]) + (f" and {len(guessed) - _SHOWN} more" if len(guessed) > _SHOWN else "")
    more = f"; of engine and transports chosen, not measured: {some}" if guessed else ""
    return f"profile {profile.name} ({profile.description}): {counted}{more}"


def table(order: Sequence[Ranked], goal: str) -> str:
    """Return the ranking as a table, best first."""
    limits = goal == "goodput_per_gpu"
    head = ["rank", "ratio", "GPUs", *(["goodput/s/GPU"] if limits else []), "tok/s/GPU"]
    head += ["TTFT p50 ms", "TTFT p99 ms", "ITL mean ms", "ITL p99 ms", "limit"]
    rows = []
    for each in order:
        if not each.rank:
            why = next(run.refused for run in each.runs if run.figures["failed"])
            rows.append(["-", each.layout.ratio, str(each.layout.gpus), f"serves not all of it: {why}"])
            continue
        cells = [str(each.rank), each.layout.ratio, str(each.layout.gpus)]
        cells += [within(each.figure("goodput_per_gpu"))] if limits else []
        cells += [within(each.figure(name)) for name in ("output_throughput_per_gpu", "ttft_ms_p50", "ttft_ms_p99")]
        rows.append([*cells, within(each.figure("itl_ms_mean")), within(each.figure("itl_ms_p99")), pressed(each)])
    widths = [max([len(head[i]), *(len(row[i]) for row in rows if len(row) == len(head))]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in [head, *rows]]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def within(found: Estimate) -> str:
    """Return a figure with its interval: ``4,210 ±35``."""
    if math.isnan(found.mean):
        return "-"
    digits = 0 if abs(found.mean) >= 1000 else max(0, 2 - math.floor(math.log10(abs(found.mean)))) if found.mean else 0
    half = found.high - found.mean
    return f"{found.mean:,.{digits}f} ±{half:,.{digits}f}" if math.isfinite(half) else f"{found.mean:,.{digits}f}"


def pressed(each: Ranked) -> str:
    """Return a ratio's limit for the table: as found by making stages faster, else the busiest stage in brackets."""
    if each.gains:
        return each.limit or "none"
    return f"({busiest(each)})"


def busiest(each: Ranked) -> str:
    """Return the stage that was at work most of the time; decode steps go on whatever the load, so they do not count."""
    return max((name for name in STAGES if name != "decode"), key=lambda name: each.stage(name).most)


def evidence(each: Ranked) -> str:
    """Return what the stages of a ratio were doing, a line each."""
    lines = []
    for name in STAGES:
        stage, parts = each.stage(name), []
        if name == "KV memory":
            parts.append(f"{stage.busy:.0%} in use in the mean, {stage.most:.0%} at most")
        elif name == "decode":
            parts.append(f"busy {stage.busy:.0%}, {stage.batch:.1f} requests a step")
        else:
            parts.append(f"busy {stage.busy:.0%} (busiest worker {stage.most:.0%})")
        if name == "KV link":
            parts += [f"{stage.wait_ms:.1f} ms a request, with its queue"] if stage.wait_ms else []
        elif name != "front end":
            parts.append(f"a request waits {stage.wait_ms:.1f} ms")
        if name in each.gains:
            how = "larger" if name == "KV memory" else "faster"
            gain, sooner = each.gains[name], each.sooner[name]
            parts.append(f"{FASTER - 1:.0%} {how}: {signed(gain)} of the goal, {signed(sooner)} of a request's time")
        lines.append(f"  {name:<10} {'; '.join(parts)}")
    return "\n".join(lines)


def signed(found: Estimate) -> str:
    """Return a change in percent, with its interval."""
    if math.isnan(found.mean):
        return "unknown change"
    half = (found.high - found.mean) * 100
    return f"{round(found.mean, 3) + 0.0:+.1%}" + (f" (±{half:.1f})" if math.isfinite(half) else "")


def verdict(order: Sequence[Ranked], goal: str) -> str:
    """Say which ratio to take, and no more than is known."""
    first = [each for each in order if each.rank == 1]
    if not first:
        return "no ratio can serve this load: a request needs more KV memory than a worker has"
    names = ", ".join(each.layout.ratio for each in first)
    if len(first) == 1:
        said = f"predicted best by {GOALS[goal]}: {names}"
    else:
        said = (
            f"predicted equal by {GOALS[goal]} (within the noise, or {LEAST_DIFFERENCE:.0%}): {names}; "
            f"of these {first[0].layout.ratio} answers soonest"
        )
    best = first[0]
    if best.limit:
        return f"{said}. {best.layout.ratio} is limited by: {best.limit}"
    sooner = min(best.sooner, key=lambda name: best.sooner[name].mean, default="")
    more = f"; what would shorten its requests most: {sooner}" if sooner and best.sooner[sooner].high < 0 else ""
    return f"{said}. No stage of {best.layout.ratio} holds it back at this load{more}"


def to_json(order: Sequence[Ranked], goal: str, load: Mapping[str, object], profiles: Mapping[str, Profile], slo: Slo) -> Json:
    """Return the ranking for programs; numbers that do not exist are null."""
    return {
        "schema": 1,
        "prediction": True,
        "goal": goal,
        "load": dict(load),
        "slo": {name: value for name, value in asdict(slo).items() if value is not None},
        "seeds": len(order[0].runs),
        "profiles": {
            name: {"description": one.description, "measured_share": one.measured_share, "sources": one.sources}
            for name, one in profiles.items()
        },
        "verdict": verdict(order, goal),
        "best": [each.layout.ratio for each in order if each.rank == 1],
        "ratios": [_entry(each) for each in order],
    }


def _entry(each: Ranked) -> Json:
    if not each.rank:
        return {"ratio": each.layout.ratio, "gpus": each.layout.gpus, "rank": None}
    return {
        "ratio": each.layout.ratio,
        "gpus": each.layout.gpus,
        "rank": each.rank,
        "limit": each.limit if each.gains else None,
        "saturated": each.saturated,
        "figures": {name: _numbers(each.figure(name)) for name in IN_JSON},
        "stages": {name: asdict(each.stage(name)) for name in STAGES},
        "gains": {name: _numbers(gain) for name, gain in each.gains.items()},
        "sooner": {name: _numbers(gain) for name, gain in each.sooner.items()},
    }


def _numbers(found: Estimate) -> Json:
    return {name: value if math.isfinite(value) else None for name, value in asdict(found).items()}


def load_words(load: Load) -> str:
    """Name a load."""
    lengths = f"{load.isl} in, {load.osl} out" if not load.rows else "lengths of a trace"
    if load.concurrency is not None:
        pace = f"{load.concurrency} in flight"
    elif load.rate is not None:
        pace = f"{load.rate:g} requests/s ({load.arrival})"
    else:
        pace = f"the trace's times x {load.replay:g}"
    return f"{lengths}, {pace}, {load.count} requests"
