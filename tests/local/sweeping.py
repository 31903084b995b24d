"""Sweeps as a user starts them, in a checkout of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from local.conftest import REPO, Checkout

from pdbench.sweep import tidy


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
        process.wait(timeout=900)
    except subprocess.TimeoutExpired:
        # As Ctrl-C: it ends its plays.
        process.terminate()
        process.wait(60)
        pytest.fail(f"{args} took over 900 s:\n{log.read_text()[-4000:]}")
    assert process.returncode == 0, log.read_text()[-6000:]
    assert "Traceback" not in log.read_text()
    return log.read_text()


def rehearsed(checkout: Checkout, name: str, inventory: str, ratios: set[str], configurations: int, log: Path) -> None:
    """Rehearse a shipped sweep: every run is valid, and the report has its parts, for each of the ``ratios``."""
    install = checkout.folder / ".pd" / "install"
    if not install.exists():
        # Installs are kept from test to test: what is made here is not the rehearsal's.
        install.parent.mkdir(exist_ok=True)
        install.symlink_to(REPO / ".pd" / "test" / "verbs")
    out = swept(checkout, log, f"sweeps/{name}.yml", "-i", inventory, "--rehearse")
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
    assert len(loads) == configurations
    assert all(one == loads.iloc[0] for one in loads), "every configuration was measured under the same loads"
    html = (folder / "report.html").read_text()
    for said in ("This is a rehearsal", "no GPU was used", *ratios):
        assert said in html
    assert f"pdbench sweep sweeps/{name}.yml -i {inventory} --rehearse" in html
    assert {path.stem for path in (folder / "figures").glob("*.png")} >= {"best", "pareto_user", "pareto_ttft", "ttft_split"}
    assert "rehearsal: " in out
