"""Sweeps that really deploy and measure: the shipped ones rehearsed to their reports, and one whose controller is killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from local.conftest import REPO, Checkout

from pdbench.sweep import tidy

#: file -> its inventory, and the ratios that its report must have, of which some were added as baselines
SHIPPED = {
    "h200x8-ratios": ("inventory/h200x8", {"3p1d", "2p2d", "1p3d", "4agg"}),
    "vllm-xpyd": ("inventory/vllm-xpyd", {"agg", "1p1d", "2agg"}),
    "gh200-a100": ("inventory/local", {"agg", "1p1d", "2agg"}),
}
#: columns of the tidy table that say how long things took, and which attempt it was: no other one may differ
MEASURED = ("attempt", "run", "duration_s", "begin", "notes", *tidy._FLOATS, "goodput")
TIMES = tuple(f"{metric}_{statistic}" for metric in tidy.LATENCIES for statistic in tidy.STATISTICS)


def start(checkout: Checkout, log: Path, *args: str) -> subprocess.Popen[str]:
    """The checkout's own `pdbench sweep`, as its user would have it; a file for what it says: plays may outlive it."""
    env = {**os.environ, "PYTHONPATH": str(checkout.folder / "bench")}
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "pdbench", "sweep", *args], cwd=checkout.folder, env=env, text=True,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def swept(checkout: Checkout, log: Path, *args: str) -> str:
    process = start(checkout, log, *args)
    try:
        process.wait(timeout=400)
    except subprocess.TimeoutExpired:
        # As Ctrl-C: it ends its plays.
        process.terminate()
        process.wait(60)
        pytest.fail(f"{args} took over 400 s:\n{log.read_text()[-4000:]}")
    assert process.returncode == 0, log.read_text()[-6000:]
    assert "Traceback" not in log.read_text()
    return log.read_text()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_sweep_is_rehearsed_to_its_report(checkout: Checkout, name: str, tmp_path: Path) -> None:
    inventory, ratios = SHIPPED[name]
    install = checkout.folder / ".pd" / "install"
    if not install.exists():
        # Installs are kept from test to test: what is made here is not the rehearsal's.
        install.parent.mkdir(exist_ok=True)
        install.symlink_to(REPO / ".pd" / "test" / "verbs")
    out = swept(checkout, tmp_path / "log", f"sweeps/{name}.yml", "-i", inventory, "--rehearse")
    assert checkout.processes() == [], "a rehearsal leaves nothing running"
    folder = checkout.folder / "results" / "sweeps" / f"{name}-rehearsal"
    table = tidy.table(folder / "results.parquet")
    assert table["valid"].all(), table["invalid_reasons"].tolist()
    assert table["emulated"].all()
    assert set(table["model"].str.split("/").str[0]) == {"emulated"}
    assert (table["completed"] == 20).all()
    assert set(table["ratio"]) == ratios
    loads = table.groupby(["ratio", "gpus"])[["isl", "osl", "concurrency"]].apply(
        lambda rows: sorted(map(tuple, rows.to_numpy()))
    )
    assert len(loads) == (4 if name == "gh200-a100" else len(ratios))
    assert all(one == loads.iloc[0] for one in loads), "every configuration was measured under the same loads"
    assert len(loads.iloc[0]) > 1
    html = (folder / "report.html").read_text()
    for said in ("This is a rehearsal", "no GPU was used", *ratios):
        assert said in html
    assert f"pdbench sweep sweeps/{name}.yml -i {inventory} --rehearse" in html
    assert {path.stem for path in (folder / "figures").glob("*.png")} >= {"best", "pareto_user", "pareto_ttft", "ttft_split"}
    assert "rehearsal: " in out


SPEC = """
grid:
  ratio: [1p1d]
  workload:
    - {isl: 64, osl: 24}
    - {isl: 256, osl: 8}
fixed: {concurrency: [4]}
requests: 20
"""


def same(folder: Path) -> pd.DataFrame:
    """The columns of a tidy table that must not depend on what happened on the way."""
    return tidy.table(folder / "results.parquet").drop(columns=[*MEASURED, *TIMES])


def requests(folder: Path) -> dict[str, list[tuple[object, ...]]]:
    """What every counted run of a sweep was sent, and answered."""
    columns = ["phase", "index", "prompt_tokens_asked", "output_tokens_asked", "ok", "output_tokens", "output_sha256"]
    found = {}
    for run in tidy.table(folder / "results.parquet").itertuples():
        rows = pq.read_table(folder / str(run.run) / "requests.parquet", columns=columns).to_pylist()
        found[f"{run.cell} {run.repeat}"] = sorted(tuple(row.values()) for row in rows)
    return found


@pytest.mark.parametrize("seed", [20261121])
def test_a_sweep_killed_in_a_cell_resumes_to_the_same_results_as_an_unbroken_one(
    clean: Checkout, tmp_path: Path, seed: int
) -> None:
    file, log, whole, broken = (tmp_path / name for name in ("s.yml", "log", "whole", "broken"))
    file.write_text(SPEC)
    swept(clean, log, str(file), "--output", str(whole))
    chance = random.Random(seed)
    cell, after = chance.randint(1, 3), chance.uniform(0.0, 4.0)
    process = start(clean, log, str(file), "--output", str(broken))
    journal = broken / "journal.jsonl"
    end = time.monotonic() + 200
    while not (journal.exists() and journal.read_text().count('"started"') >= cell):
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < end, "the sweep never came to the cell"
        time.sleep(0.1)
    time.sleep(after)
    process.kill()
    process.wait()
    events = [json.loads(line)["event"] for line in journal.read_text().splitlines()]
    assert events[-1] != "ended"
    assert not (broken / "results.parquet").exists()
    out = swept(clean, log, str(file), "--output", str(broken), "--resume")
    assert f"{events.count('finished')} of 4 are measured" in out
    # The cell that was lost is measured once more, no other one is.
    started = journal.read_text().count('"started"')
    assert started == 4 + events.count("started") - events.count("finished")
    pd.testing.assert_frame_equal(same(broken), same(whole))
    assert same(whole)["valid"].all()
    assert len(same(whole)) == 4
    assert requests(broken) == requests(whole)
