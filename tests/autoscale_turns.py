"""A load that turns, under fixed ratios and under `pdbench autoscale`, on emulated workers: docs/results/autoscale.md.

    PYTHONPATH=tests .venv/bin/python -m autoscale_turns

Half an hour; nothing may be deployed with inventory/local. Every policy gets the same requests at the same times. Prints the
page's table and draws its picture.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from sweep_order import INVENTORY, teardown

from pdbench.intervals import wilson
from pdbench.metrics import Slo, tpot_s, ttft_s
from pdbench.records import MEASURE, Record, read_parquet
from pdbench.report.draw import drawn
from pdbench.report.look import BLUE, GREEN, LIGHT, ORANGE, VERMILLION
from pdbench.sweep import plays
from pdbench.sweep.checkout import ROOT

PICTURE = ROOT / "docs" / "results" / "autoscale.png"
#: seconds of a phase, and requests/s, prompt and answer tokens in each
PHASE_S = 90.0
PROMPTS, ANSWERS = (3.0, 4000, 4), (11.0, 32, 100)
PHASES = (PROMPTS, ANSWERS, PROMPTS, ANSWERS)
LIMITS = Slo(ttft_ms=1000.0, tpot_ms=100.0)
SIXTEEN: Mapping[str, Any] = {"max-running-requests": 16}
BIN_S = 10.0


@dataclass(frozen=True)
class Policy:
    """What is deployed first, and whether it is watched."""

    name: str
    colour: str
    ratio: str
    watched: bool = False
    more: Mapping[str, Any] | None = None


POLICIES = (
    Policy("1p2d", BLUE, "1p2d"),
    Policy("2p1d", ORANGE, "2p1d"),
    Policy("autoscale, by restart", VERMILLION, "1p2d", watched=True),
    Policy(
        "autoscale, in place", GREEN, "1p2d", watched=True,
        more={"transfer_backend": "mooncake_tcp", "engine_args": {**SIXTEEN, "enable-pd-role-switch": True}},
    ),
)  # fmt: skip


@dataclass
class Seen:
    """What came of a policy."""

    policy: Policy
    records: Sequence[Record]
    changes: Sequence[Mapping[str, Any]]


def trace(path: Path) -> int:
    """Write the load as a trace; return how many requests it has."""
    rng, rows = np.random.default_rng(20261122), list[dict[str, int]]()
    for number, (rate, isl, osl) in enumerate(PHASES):
        at = float(rng.exponential(1 / rate))
        while at < PHASE_S:
            rows.append({"timestamp": int((number * PHASE_S + at) * 1000), "input_length": isl, "output_length": osl})
            at += float(rng.exponential(1 / rate))
    path.write_text("".join(json.dumps({**row, "hash_ids": []}) + "\n" for row in rows))
    return len(rows)


def verb(*words: str) -> subprocess.Popen[str]:
    """Start `pdbench VERB`; what it says goes to our stderr."""
    return subprocess.Popen(
        [sys.executable, "-m", "pdbench", *words], cwd=ROOT, text=True, stdin=subprocess.DEVNULL, stdout=sys.stderr
    )


def measure(policy: Policy, folder: Path, file: Path, requests: int) -> Seen:
    """Deploy, load, and watch where the policy does."""
    folder.mkdir()
    given = {"ratio": policy.ratio, "engine_args": dict(SIXTEEN), **(policy.more or {})}
    play = plays.Play("deploy_pd.yml", given, plays.inventory_path(INVENTORY), None, folder / plays.SCRATCH)
    play.wait()
    if play.rc:
        raise SystemExit(f"deploy: {play.why}")
    plan = json.loads((ROOT / ".pd" / "state-a100" / "plan.json").read_text())
    promised = ["--slo-ttft-ms", str(LIMITS.ttft_ms), "--slo-tpot-ms", str(LIMITS.tpot_ms)]
    watch = ["autoscale", "-i", INVENTORY, *promised, "--every", "5", "--rest", "10", "--output", str(folder / "watch")]
    watcher = verb(*watch) if policy.watched else None
    words = ["--url", plan["router"]["url"], "--model", plan["served_model_name"], "--trace", str(file), "--time-scale", "1"]
    verb("run", *words, *promised, "--num-requests", str(requests), "--output", str(folder / "run")).wait()
    if watcher:
        watcher.terminate()
        watcher.wait()
    log = folder / "watch" / "autoscale.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()] if policy.watched else []
    records = [record for record in read_parquet(folder / "run" / "requests.parquet") if record.phase == MEASURE]
    return Seen(policy, records, [entry for entry in entries if entry["kind"] == "change"])


def good(record: Record) -> bool:
    """Whether a request kept both limits."""
    assert LIMITS.ttft_ms
    assert LIMITS.tpot_ms
    return record.ok and ttft_s(record) * 1000 <= LIMITS.ttft_ms and (tpot_s(record) or 0.0) * 1000 <= LIMITS.tpot_ms


def phase(record: Record) -> int:
    """Return the place of the phase in which a request was due."""
    return min(int(record.scheduled_s // PHASE_S), len(PHASES) - 1)


def share(records: Sequence[Record]) -> str:
    """Return the share of good requests, %, with its 95 % interval."""
    kept = sum(map(good, records))
    low, high = wilson(kept, len(records))
    return f"{100 * kept / len(records):.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def table(found: Sequence[Seen]) -> str:
    """Return the page's table."""
    heads = [f"{'prompts' if one is PROMPTS else 'answers'}, {PHASE_S:.0f} s" for one in PHASES]
    rows = [f"| policy | good requests, % | {' | '.join(heads)} | failed | changes took, s |", "|---" * (len(PHASES) + 4) + "|"]
    for seen in found:
        cells = [share([record for record in seen.records if phase(record) == place]) for place in range(len(PHASES))]
        failed = sum(not record.ok for record in seen.records)
        took = ", ".join(f"{change['took_s']:.0f}" for change in seen.changes if change["ok"])
        rows.append(f"| {seen.policy.name} | **{share(seen.records)}** | {' | '.join(cells)} | {failed} | {took or '-'} |")
    return "\n".join(rows)


def picture(found: Sequence[Seen]) -> bytes:
    """Return a PNG: the share of good requests over time, a panel a policy."""

    def build() -> Figure:
        figure, axes = plt.subplots(len(found), 1, figsize=(9, 1.7 * len(found) + 0.8), sharex=True, sharey=True)
        edges = np.arange(0, PHASE_S * len(PHASES) + BIN_S, BIN_S)
        for ax, seen in zip(axes, found, strict=True):
            due = np.array([record.scheduled_s for record in seen.records])
            kept = np.array([good(record) for record in seen.records], dtype=float)
            sums, _ = np.histogram(due, edges, weights=kept)
            counts, _ = np.histogram(due, edges)
            ax.stairs(100 * sums / np.maximum(counts, 1), edges, fill=True, color=seen.policy.colour, alpha=0.8)
            for number in range(1, len(PHASES)):
                ax.axvline(number * PHASE_S, color=LIGHT.ink, linewidth=0.9, linestyle=":")
            ax.set_title(seen.policy.name, loc="left", fontsize=9)
        axes[-1].set_xlabel("seconds; dotted: the load turns")
        axes[len(found) // 2].set_ylabel("good requests, %")
        return figure

    return drawn(build, LIGHT, "", "emulated: no GPU was used", "png")[0]


def main() -> None:
    """Measure every policy."""
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        requests = trace(base / "turns.jsonl")
        found = []
        try:
            for number, policy in enumerate(POLICIES):
                teardown(base)
                print(f"{policy.name}: {requests} requests", file=sys.stderr, flush=True)
                found.append(measure(policy, base / str(number), base / "turns.jsonl", requests))
                print(f"{policy.name}: {share(found[-1].records)} %", file=sys.stderr, flush=True)
        finally:
            teardown(base)
    PICTURE.write_bytes(picture(found))
    print(table(found))


if __name__ == "__main__":
    main()
