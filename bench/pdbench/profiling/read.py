"""`pdbench traces DIR`: open every trace of a profile's folder, and say what took the time."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pdbench.load.errors import LoadError
from pdbench.profiling import targets
from pdbench.profiling.targets import Target
from pdbench.profiling.trace import TraceError, read
from pdbench.reading import json_in
from pdbench.records import write_json

Json = dict[str, Any]
_TOP = 12
_NAME = 76
_DECODE = re.compile(r"Decode batch.*?#running-req: (\d+).*?gen throughput \(token/s\): ([\d.]+)")
_PREFILL = re.compile(r"Prefill batch.*?#new-token: (\d+).*?input throughput \(token/s\): ([\d.]+)")


def main(argv: list[str]) -> int:
    """Run the verb; 0: every worker's traces are there and open, 1: not, 2: bad usage."""
    parser = argparse.ArgumentParser(
        prog="pdbench traces",
        description="Say what the profiler's traces under DIR/traces/WORKER hold: steps, gaps, the kernels that took the time.",
        epilog="Writes traces.json into DIR. Open a trace itself at https://ui.perfetto.dev or in chrome://tracing.",
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="a folder that profile.yml has made")
    parser.add_argument("--top", type=int, default=_TOP, metavar="N", help="kernels to show of each worker (default: 12)")
    args = parser.parse_args(argv)
    if not args.dir.is_dir():
        print(f"pdbench traces: {args.dir} is no folder", file=sys.stderr)
        return 2
    told, problems = digest(args.dir)
    write_json(args.dir / "traces.json", told)
    print(render(told, args.top))
    for problem in problems:
        print(f"pdbench traces: {problem}", file=sys.stderr)
    return 1 if problems else 0


def digest(folder: Path) -> tuple[Json, list[str]]:
    """Return what the traces of a folder say, and what is wrong with them."""
    profile = json_in(folder / "profile.json")
    role = str(profile.get("wish", {}).get("role", ""))
    problems = [str(problem) for problem in profile.get("problems", [])]
    workers: Json = {}
    for worker in _targets(folder, role, problems):
        name, found = worker.name, []
        for path in sorted((folder / "traces" / worker.unit).glob("*.trace.json*")):
            try:
                found.append(read(path, str(path.relative_to(folder))))
            except TraceError as why:
                problems.append(str(why))
        expected = worker.ranks
        if len({trace.rank for trace in found}) < expected:
            have = ", ".join(sorted({trace.rank for trace in found})) or "none"
            problems.append(f"{name} has {expected} rank{'s' if expected > 1 else ''}, and traces came of: {have}")
        if name in profile.get("cut_short", []) and not any(trace.steps_ms for trace in found):
            asked = f"{name} recorded none of {_asked(profile)} steps"
            problems.append(f"{asked}: the load was over; send more requests, or longer prompts")
        workers[name] = {
            "ranks": expected,
            "gathered": profile.get("gathered", {}).get(name),
            "wanted": profile.get("wanted", {}).get(name),
            "cut_short": name in profile.get("cut_short", []),
            "traces": [trace.to_json() for trace in found],
            "log": _log(folder / "logs", worker.unit, role),
        }
    load = _load(json_in(folder / "summary.json"))
    return {"schema": 1, "role": role, "load": load, "steps": _asked(profile), "workers": workers, "problems": problems}, problems


def _targets(folder: Path, role: str, problems: list[str]) -> tuple[Target, ...]:
    try:
        return targets.read(folder / "plan.json", role, "")
    except LoadError as why:
        problems.append(f"{why}; was this folder made by profile.yml?")
        return ()


def _load(summary: Mapping[str, Any]) -> Json | None:
    """Return the load's own figures, as one-batch tools give them (SGLang's bench_one_batch_server)."""
    for point in summary.get("points", [])[:1]:
        names = ("completed", "failed", "duration_s", "input_throughput", "output_throughput")
        return {
            **{name: point.get(name) for name in names},
            "ttft_ms": point["ttft_ms"]["mean"],
            "itl_ms": point["itl_ms"]["mean"],
        }
    return None


def _asked(profile: Mapping[str, Any]) -> int:
    return int(profile.get("wish", {}).get("steps", 0))


def _log(folder: Path, unit: str, role: str) -> Json | None:
    """Return what the engine's own log says of its batches: throughput, and of decode the time from step to step.

    A decode step gives every running request a token, so that a step takes requests / throughput.
    """
    lines = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob(f"*-pd-{unit}.log")))
    pairs = [(int(a), float(b)) for a, b in (_DECODE if role == "decode" else _PREFILL).findall(lines) if int(a) and float(b)]
    if not pairs:
        return None
    figures: Json = {"lines": len(pairs), "tokens_per_s": median(rate for _, rate in pairs)}
    figures["requests" if role == "decode" else "tokens"] = median(size for size, _ in pairs)
    if role == "decode":
        figures["gap_ms"] = median(1000 * size / rate for size, rate in pairs)
    return figures


def render(told: Mapping[str, Any], top: int) -> str:
    """Return tables for people."""
    rows = []
    for name, worker in told["workers"].items():
        for trace in worker["traces"]:
            step, gap, batch = trace["step_ms"], trace["gap_ms"], trace["batch"]
            rows.append(
                [
                    name,
                    trace["rank"],
                    str(trace["steps"]) + (" (cut short)" if worker["cut_short"] else ""),
                    _span(batch),
                    f"{step['mean']:.2f}" if step else "-",
                    f"{gap['mean']:.2f}" if gap else "-",
                    f"{trace['gpu_busy']:.0%}" if trace["gpu_busy"] is not None else "no GPU",
                    str(trace["events"]),
                ]
            )
    heads = ["worker", "rank", "steps", "requests", "step ms", "gap ms", "GPU busy", "events"]
    parts = [_table(heads, rows)]
    parts += [_kernels(name, worker, top) for name, worker in told["workers"].items() if worker["traces"]]
    logs = [
        [name, str(log["lines"]), f"{log['tokens_per_s']:.0f}", f"{log.get('gap_ms', 0):.2f}" if "gap_ms" in log else "-"]
        for name, worker in told["workers"].items()
        if (log := worker["log"])
    ]
    if logs:
        parts.append("of the engine's own log (medians):\n" + _table(["worker", "lines", "tokens/s", "gap ms"], logs))
    if load := told["load"]:
        parts.append(
            f"the load: {load['completed']} requests ({load['failed']} failed) in {load['duration_s']:.1f} s, "
            f"{load['input_throughput']:.0f} tokens/s in, {load['output_throughput']:.0f} out, TTFT {load['ttft_ms']:.0f} ms, "
            f"ITL {load['itl_ms']:.2f} ms; slowed down or profiled, it is no benchmark"
        )
    if any(trace["emulated"] for worker in told["workers"].values() for trace in worker["traces"]):
        parts.append("EMULATED: no GPU was used; steps are those of the performance model, and there are no kernels.")
    return "\n\n".join(parts)


def _kernels(name: str, worker: Mapping[str, Any], top: int) -> str:
    first = worker["traces"][0]
    whole = sum(kernel["total_ms"] for kernel in first["kernels"])
    steps = first["steps"] or 1
    rows = [
        [_short(k["name"]), str(k["calls"]), f"{k['total_ms'] / steps:.3f}", f"{k['total_ms'] / whole:.1%}" if whole else "-"]
        for k in first["kernels"][:top]
    ]
    what = "kernels" if first["kernels_of"] == "gpu" else "CPU operators (own time)"
    if not rows:
        return f"{name} {first['rank']}: no {what} in the trace"
    return f"{name} {first['rank']}: {what} that took the most time\n" + _table([what, "calls", "ms a step", "share"], rows)


def _short(name: str) -> str:
    return name if len(name) <= _NAME else name[: _NAME - 3] + "..."


def _span(batch: Mapping[str, int] | None) -> str:
    if not batch:
        return "-"
    return str(batch["min"]) if batch["min"] == batch["max"] else f"{batch['min']}-{batch['max']}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in [heads, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)
