"""The tidy table: what a sweep's run folders become."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.gate_faults import fail_a_request
from unit.runfolder import good

from pdbench.cli import main
from pdbench.gate.rundata import NotARun
from pdbench.sweep import tidy

Json = dict[str, Any]


def sweep(folder: Path, cells: dict[str, Json]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    listed = [{"id": name, "variables": variables, "deploy": {}, "load": {}} for name, variables in cells.items()]
    (folder / "sweep.json").write_text(json.dumps({"schema": 1, "name": "nightly", "cells": listed, "order": []}))
    return folder


def run(folder: Path, concurrency: tuple[int, ...] = (4,), judged: bool = True) -> Path:
    good(concurrency=concurrency).write(folder)
    if judged:
        assert main(["gate", str(folder)]) == 0
    return folder


def test_a_row_a_load_point_with_the_figures_of_the_summary(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s", {"b": {"ratio": "3p1d"}, "a": {}})
    run(folder / "runs/a/r1a1")
    run(folder / "runs/b/r1a1", (4, 8))
    found = tidy.write(folder)
    assert list(found["cell"]) == ["b", "b", "a"]  # the order of the specification
    assert list(found["concurrency"]) == [4, 8, 4]
    points = json.loads((folder / "runs/b/r1a1/summary.json").read_text())["points"]
    row = found.iloc[1]
    assert row["ttft_ms_p99"] == points[1]["ttft_ms"]["p99"]
    assert row["output_throughput_per_gpu"] == pytest.approx(points[1]["output_throughput"] / 4)
    assert (row["prefill_workers"], row["decode_workers"], row["gpus"], row["isl"], row["osl"]) == (3, 1, 4, 64, 6)
    assert row["valid"] is True or row["valid"] == True  # noqa: E712
    assert (row["run"], row["variables"], row["sweep"]) == ("runs/b/r1a1", '{"ratio": "3p1d"}', "nightly")
    pd.testing.assert_frame_equal(tidy.table(folder / "results.parquet"), found)
    pd.testing.assert_frame_equal(tidy.table(folder / "results.csv"), found)


def test_the_attempt_that_counts_is_the_newest_valid_one(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s", {"a": {}})
    run(folder / "runs/a/r1a1")
    (folder / "runs/a/r1a2").mkdir()
    assert list(tidy.read(folder)["attempt"]) == [1]
    shutil.copytree(folder / "runs/a/r1a1", folder / "runs/a/r1a10")
    assert list(tidy.read(folder)["attempt"]) == [10]


def test_an_attempt_that_measured_nothing_is_a_row_without_figures(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s", {"a": {}})
    (folder / "runs/a/r2a1").mkdir(parents=True)
    (row,) = tidy.read(folder).to_dict("records")
    assert (row["repeat"], row["valid"]) == (2, False)
    assert row["invalid_reasons"] == "nothing was measured: summary.json is missing"
    assert pd.isna(row["ttft_ms_mean"])


def test_a_failed_check_makes_its_load_point_invalid_and_one_of_the_run_all(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", (4, 8))
    path = folder / "validity.json"
    verdict = json.loads(path.read_text())
    verdict["checks"].append({"id": "x", "ok": False, "point": 1, "message": "KV did not move", "evidence": {}})
    path.write_text(json.dumps({**verdict, "valid": False}))
    found = tidy.read_runs([folder])
    assert list(found["valid"]) == [True, False]
    assert found["invalid_reasons"].iloc[1] == "KV did not move"
    verdict["checks"][-1]["point"] = None
    path.write_text(json.dumps({**verdict, "valid": False}))
    assert not tidy.read_runs([folder])["valid"].any()


def test_requests_that_may_fail_leave_a_point_valid_and_are_noted(tmp_path: Path) -> None:
    made = good(concurrency=(4,))
    fail_a_request(made)
    made.manifest["bench_max_error_rate"] = 0.05
    made.write(tmp_path / "r")
    (row,) = tidy.read_runs([tmp_path / "r"]).to_dict("records")
    assert row["valid"] is False
    assert "1 of 24 requests failed" in row["invalid_reasons"]
    assert main(["gate", str(tmp_path / "r")]) == 0
    (row,) = tidy.read_runs([tmp_path / "r"]).to_dict("records")
    assert (row["valid"], row["invalid_reasons"]) == (True, "")
    assert "1 failed request is in no percentile" in row["notes"]


def test_nobody_judged_is_neither_valid_nor_invalid(tmp_path: Path) -> None:
    (row,) = tidy.read_runs([run(tmp_path / "r", judged=False)]).to_dict("records")
    assert pd.isna(row["valid"])
    assert "pdbench gate" in row["invalid_reasons"]


def test_without_a_sound_plan_the_run_itself_says_what_it_was_told(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", judged=False)
    for plan in ('{"workers": [1]}', '{"workers": [{"role": "prefill"}]}', "{", "[]"):
        (folder / "plan.json").write_text(plan)
        (row,) = tidy.read_runs([folder]).to_dict("records")
        assert (row["ratio"], row["gpus"], row["engine"]) == ("3p1d", 4, "")
        assert pd.isna(row["prefill_workers"])


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "has no sweep.json"), ("{", "cannot be read"), ('{"cells": [{}]}', "id is missing")],
)
def test_what_is_no_sweep_is_refused_in_one_sentence(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(NotARun, match=said):
        tidy.read(tmp_path)
    with pytest.raises(NotARun, match="not the folder of a run"):
        tidy.read_runs([tmp_path / "nowhere"])


def test_a_file_that_is_no_tidy_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("cell,ratio\na,1p1d\n")
    with pytest.raises(NotARun, match="lacks the column sweep"):
        tidy.table(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_text("PAR")
    with pytest.raises(NotARun, match="cannot be read"):
        tidy.table(tmp_path / "a.parquet")
    with pytest.raises(NotARun, match="missing"):
        tidy.table(tmp_path / "none.csv")


_VALUES = {
    "str": st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=8),
    "Int64": st.none() | st.integers(-(2**31), 2**31),
    "float64": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "boolean": st.none() | st.booleans(),
    "datetime64[us, UTC]": st.none() | st.datetimes().map(lambda t: t.replace(year=2026).isoformat() + "+00:00"),
}


@settings(max_examples=20)
@given(st.lists(st.fixed_dictionaries({}, optional={name: _VALUES[kind] for name, kind in tidy.COLUMNS.items()}), max_size=4))
def test_what_is_saved_is_read_again(tmp_path_factory: pytest.TempPathFactory, rows: list[Json]) -> None:
    folder = tmp_path_factory.mktemp("t")
    found = tidy.frame(rows)
    assert {name: str(kind) for name, kind in found.dtypes.items()} == tidy.COLUMNS
    tidy.save(folder, found)
    pd.testing.assert_frame_equal(tidy.table(folder / "results.parquet"), found)
    pd.testing.assert_frame_equal(tidy.table(folder / "results.csv"), found)
    assert sorted(path.name for path in folder.iterdir()) == ["results.csv", "results.parquet"]
