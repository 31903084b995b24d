"""A sweep that is rehearsed to its report, and one whose controller is killed: both deploy and measure."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from local.conftest import Checkout
from local.sweeping import rehearsed, start, swept

from pdbench.sweep import tidy

#: s, of a test: a dozen plays and more, on a machine that may have others to do
pytestmark = pytest.mark.timeout(1800)
#: columns of the tidy table that say how long things took, and which attempt it was: no other one may differ
MEASURED = ("attempt", "run", "duration_s", "begin", "notes", *tidy._FLOATS, "goodput")
TIMES = tuple(f"{metric}_{statistic}" for metric in tidy.LATENCIES for statistic in tidy.STATISTICS)


def test_a_sweep_over_two_inventories_is_rehearsed_to_its_report(checkout: Checkout, tmp_path: Path) -> None:
    ratios = {"agg", "1p1d", "2agg"}
    rehearsed(checkout, "gh200-a100", "inventory/local", ratios, 4, tmp_path / "log")


SPEC = """
grid:
  ratio: [1p1d]
  workload:
    - {isl: 64, osl: 24}
    - {isl: 256, osl: 8}
fixed: {concurrency: [4], bench_max_client_delay_ms: 5000}
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
    end = time.monotonic() + 600
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
