"""One sweep in its own order and in that of its file, really deployed on emulated workers: docs/results/sweep-order.md.

    PYTHONPATH=tests .venv/bin/python -m sweep_order > docs/results/sweep-order.md

Some 12 minutes; nothing may be deployed with inventory/local. Workers that were started are counted by their processes, not
taken from the plan. `--planned` deploys nothing and leaves the measured half out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from local.test_sweep import SHIPPED

from pdbench.sweep import grid, journal, order, planning, plays, spec, table
from pdbench.sweep.checkout import ROOT
from pdbench.sweep.drive import Ended, Sweep
from pdbench.sweep.grid import Cell
from pdbench.sweep.planning import Planned
from pdlib import processes
from pdlib.tables import duration

INVENTORY = "inventory/local"
SPEC = """grid:
  workload:
    - {isl: 512, osl: 32}
    - {isl: 128, osl: 64}
  ratio: [3p1d, 1p3d, 2p2d]
fixed: {emulated_profile: h200-qwen2.5-3b, concurrency: [8], bench_selfcheck: false}
requests: 40
repeats: 1
"""


@dataclass
class Took:
    """What an order cost: counted and timed (s)."""

    workers: int = 0
    routers: int = 0
    deploys: int = 0
    deploy_s: float = 0.0
    load_s: float = 0.0
    whole_s: float = 0.0
    bad: list[str] = field(default_factory=list)


class Counting(plays.Plays):
    """Plays that count which processes a deploy started."""

    def __init__(self, folder: Path, loads: Mapping[str, int], state_dirs: set[str], took: Took):
        super().__init__(folder, None, loads, lambda line: None)
        self.state_dirs, self.took = state_dirs, took

    def _units(self) -> dict[str, int]:
        """Return the first process of every unit."""
        found: dict[str, int] = {}
        for state_dir in self.state_dirs:
            for process in processes.ours(state_dir):
                unit = Path(process.cwd).name
                found[unit] = min(process.pid, found.get(unit, process.pid))
        return found

    def deploy(self, cell: Cell, folder: Path) -> Ended:
        """Deploy, and count what is another process than before."""
        before = self._units()
        ended = super().deploy(cell, folder)
        fresh = [unit for unit, pid in self._units().items() if before.get(unit) != pid]
        self.took.deploys += 1
        self.took.routers += fresh.count("pd-router")
        self.took.workers += sum(unit.startswith(("pd-prefill", "pd-decode", "pd-aggregated")) for unit in fresh)
        return ended


class Timing:
    """Adds up how long plays took."""

    def __init__(self, took: Took):
        self.took = took

    def doing(self, verb: str, cell: Cell, repeat: int, attempt: int) -> None:
        """Nothing is to be shown."""

    def done(self, verb: str, cell: Cell, repeat: int, seconds: float, ended: Ended) -> None:
        """Add it."""
        print(f"  {verb} {cell.id} {repeat}: {ended.how}, {seconds:.1f} s", file=sys.stderr, flush=True)
        if verb == "bench":
            self.took.load_s += seconds
        else:
            self.took.deploy_s += seconds
        if ended.how != journal.FINISHED:
            self.took.bad.append(f"{cell.id}: {ended.why}")


def planned(raw: Any, name: str, inventory: str) -> tuple[Planned, order.Arrangement, order.Arrangement]:
    """Return a sweep's plans, its order and that of its file."""
    read = spec.parse(raw, name, name)
    cells = grid.cells(read, inventory)
    made = planning.make(cells, read.baseline, lambda where, deployments: plays.resolve(where, deployments, None))
    keys = list(made.plans)
    numbers = [keys.index(cell.deployment) for cell in made.cells]
    return made, *order.arrange(numbers, read.repeats, lambda n, running: made.replan(keys[n], running))


def teardown(folder: Path) -> None:
    """End what inventory/local runs; raise SystemExit when that fails."""
    play = plays.Play("teardown.yml", {}, plays.inventory_path(INVENTORY), None, folder / plays.SCRATCH)
    play.wait()
    if play.rc:
        raise SystemExit(f"teardown: {play.why}")


def measure(folder: Path, made: Planned, one: order.Arrangement) -> Took:
    """Carry an order out, from hosts that run nothing."""
    folder.mkdir()
    teardown(folder)
    took = Took()
    dirs = {str(host["state_dir"]) for plan in made.plans.values() for host in plan["hosts"].values()}
    driver = Counting(folder, grid.loads(made.cells), dirs, took)
    wanted = [(made.cells[place].id, repeat) for place, repeat in one.order]
    began = time.monotonic()
    try:
        with plays.interruptible():
            Sweep(folder, made.cells, wanted, journal.Journal(folder), driver, Timing(took)).run(0)
        took.whole_s = time.monotonic() - began
    finally:
        driver.close()
        teardown(folder)
    return took


def measured() -> str:
    """Return the first table."""
    made, ours, plain = planned(yaml.safe_load(SPEC), "order", INVENTORY)
    rows = []
    with tempfile.TemporaryDirectory(prefix="sweep-order-") as name:
        # What the first deploy installs is no part of an order's cost.
        print("installing", file=sys.stderr, flush=True)
        (Path(name) / "first").mkdir()
        first = Counting(Path(name) / "first", grid.loads(made.cells), set(), Took()).deploy(made.cells[0], Path(name) / "first")
        if first.how != journal.FINISHED:
            raise SystemExit(f"deploy: {first.why}")
        for words, one in (("of the file", plain), ("of the sweep", ours)):
            print(words, file=sys.stderr, flush=True)
            took = measure(Path(name) / words.replace(" ", "-"), made, one)
            if took.bad:
                raise SystemExit("\n".join(took.bad))
            said = f"{took.workers} ({one.cost.workers})", f"{took.routers} ({one.cost.routers})", f"{took.deploys}"
            rows.append(f"| {words} | {' | '.join(said)} | {took.deploy_s:.0f} | {took.load_s:.0f} | {took.whole_s:.0f} |")
    return "\n".join(rows)


def foretold() -> str:
    """Return the second table: the shipped sweeps, as they are planned."""
    rows = []
    for name, (inventory, *_) in SHIPPED.items():
        made, ours, plain = planned(yaml.safe_load((ROOT / "sweeps" / f"{name}.yml").read_text()), name, inventory)
        costs = [
            (one.cost.workers, one.cost.deploys, duration(sum(a + b for a, b in table.seconds(one, made))))
            for one in (plain, ours)
        ]
        pairs = [f"{old} → {new}" for old, new in zip(*costs, strict=True)]
        rows.append(f"| {name} | {len(ours.order)} | {len(made.plans)} | {' | '.join(pairs)} |")
    return "\n".join(rows)


_HEAD = """# What the order of a sweep saves

    PYTHONPATH=tests .venv/bin/python -m sweep_order{option} > docs/results/sweep-order.md

"""
_MEASURED = """## Measured
{when}: 3p1d, 1p3d, 2p2d and the baseline 4agg, two loads, 8 runs on `inventory/local`: two emulated hosts on one machine of
two cores, **no GPU was used**. Workers take 30 s to start (profile `h200-qwen2.5-3b`, which has that from SGLang on H200 with
warm kernels), so that a restart costs what it costs there; the load is short. The file has the load as its slowest axis, as one
writes it who thinks of loads first. One sweep in each order, each from nothing deployed.

| order | workers started (planned) | routers started (planned) | deploys | deploys, s | load, s | whole, s |
|---|---|---|---|---|---|---|
{measured}

Workers are counted by their processes. All workers of one deploy start at the same time, so time follows the deploys that start
any, not the number of workers.

"""
_PLANNED = """## Planned: the shipped sweeps
Order of the file → order of the sweep, as `--dry-run` has them. The time is assumed (90 s for a start, 120 s for another model),
measurements included.

| sweep | runs | deployments | workers started | deploys | time |
|---|---|---|---|---|---|
{planned}

A file that has the ratio as its slowest axis leaves less to gain: the baselines that are added, the turn between two
rounds, and neighbours that share more workers.
"""


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--planned", action="store_true", help="deploy nothing: leave the measured half out")
    if parser.parse_args().planned:
        print(_HEAD.format(option=" --planned"), end="")
    else:
        print(_HEAD.format(option="") + _MEASURED.format(when=time.strftime("%Y-%m-%d"), measured=measured()), end="")
    print(_PLANNED.format(planned=foretold()), end="")


if __name__ == "__main__":
    main()
