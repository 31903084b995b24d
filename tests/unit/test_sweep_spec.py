"""A sweep's file: what is refused and how, and which cells it means."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pdbench.sweep import grid, spec
from pdlib.errors import UserError

Json = dict[str, Any]


def parsed(**raw: Any) -> spec.Spec:
    return spec.parse(raw, "name", "s.yml")


def cells(**raw: Any) -> list[grid.Cell]:
    return grid.cells(parsed(**raw), "inventory/x")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"gird": {"ratio": ["agg"]}}, "there is no key gird; did you mean grid?"),
        ({"grid": {"ration": ["agg"]}}, "there is no variable ration; did you mean ratio?"),
        ({"grid": {"concurency": [1]}}, "there is no variable concurency; did you mean concurrency?"),
        ({"grid": {"ratio": ["3x1d"]}}, "'3x1d' is not a ratio"),
        ({"grid": {"ratio": []}}, "ratio: expected a list of values"),
        ({"grid": {"ratio": "agg"}}, "ratio: expected a list of values"),
        ({"grid": {"ratio": ["agg", "AGG"]}}, "ratio has a value twice"),
        ({"grid": {"concurrency": ["many"]}}, "bench_concurrency='many' (s.yml, grid): expected whole numbers"),
        ({"grid": {"load": [{"isl": 1}], "isl": [1]}}, "bench_input_len is set by the axis load and by the axis isl"),
        ({"grid": {"ratio": ["agg"]}, "fixed": {"ratio": "agg"}}, "ratio is set by fixed and by the axis ratio"),
        ({"grid": {"ratio": ["agg"]}, "fixed": {"isl": 1, "bench_input_len": 2}}, "bench_input_len is set twice"),
        ({"grid": {"ratio": ["agg"]}, "fixed": {"api_key": "x"}}, "api_key is a secret"),
        ({"grid": {"ratio": ["agg"]}, "fixed": {"results_dir": "x"}}, "results_dir is set by the sweep itself"),
        ({"grid": {"ratio": ["agg"]}, "fixed": {"model": "{{ x }}"}}, "a template belongs in the inventory"),
        ({"grid": {"ratio": ["agg"]}, "repeats": 0}, "repeats: 0: expected a whole number, at least 1"),
        ({"grid": {"ratio": ["agg"]}, "retries": True}, "retries: True: expected a whole number"),
        ({"grid": {"ratio": ["agg"]}, "baseline": "no"}, "baseline: 'no': expected true or false"),
        ({"grid": {"ratio": ["agg"]}, "name": "../x"}, "names a folder"),
        ({"cells": {"ratio": "agg"}}, "cells: expected a list of mappings"),
        ({"cells": [{"model": None}]}, "cell 1 of cells: model has no value"),
        ({"fixed": {"ratio": "agg"}}, "neither grid: nor cells:"),
    ],
)
def test_a_wrong_file_is_refused_with_what_would_be_right(raw: Json, said: str) -> None:
    with pytest.raises(UserError) as error:
        spec.parse(raw, "name", "s.yml")
    assert said in str(error.value)
    assert "s.yml" in str(error.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.yml").write_text("grid: [\n")
    for name, said in (("bad.yml", "is not YAML"), ("none.yml", "No such file")):
        with pytest.raises(UserError, match=said):
            spec.read(tmp_path / name)
    with pytest.raises(UserError, match="expected a mapping"):
        spec.parse([], "n", "s.yml")


def test_axes_are_multiplied_and_listed_cells_come_after_them() -> None:
    found = cells(
        grid={"ratio": ["1p1d", "agg"], "load": [{"isl": 512, "osl": 64}, {"isl": 64, "osl": 8}]},
        cells=[{"ratio": "2p2d", "isl": 1, "inventory": "inventory/y"}],
        fixed={"engine": "emulated", "concurrency": [1, 2]},
    )
    assert [cell.id for cell in found] == ["1p1d-i512-o64", "1p1d-i64-o8", "agg-i512-o64", "agg-i64-o8", "2p2d-y-i1"]
    assert found[0].deploy == {"engine": "emulated", "ratio": "1p1d"}
    assert found[0].load == {"bench_concurrency": [1, 2], "bench_input_len": 512, "bench_output_len": 64}
    assert found[0].variables == {"ratio": "1p1d", "bench_input_len": 512, "bench_output_len": 64}
    assert [cell.inventory for cell in found] == ["inventory/x"] * 4 + ["inventory/y"]


AXES: dict[str, list[Any]] = {
    "ratio": ["agg", "2agg", "1p1d", "3p1d"],
    "concurrency": [1, 2, 4],
    "isl": [16, "16-32"],
    "engine_args": [{"page-size": 1}, {"page-size": 16}, {}],
    "transfer_backend": ["nixl", "mooncake"],
    "model": ["org/a", "other/a"],
}


@given(st.lists(st.sampled_from(sorted(AXES)), unique=True, min_size=1), st.data())
def test_the_grid_is_the_product_of_its_axes_each_cell_once_and_named_apart(names: list[str], data: st.DataObject) -> None:
    axes = {name: data.draw(st.lists(st.sampled_from(AXES[name]), min_size=1, unique_by=str)) for name in names}
    found = cells(grid=axes)
    wanted = set()
    for values in itertools.product(*axes.values()):
        cell = dict(zip(axes, values, strict=True))
        if "agg" in str(cell.get("ratio")):
            cell.pop("transfer_backend", None)
        wanted.add(grid.canonical({spec.ALIASES.get(name, name): value for name, value in cell.items()}))
    assert [grid.canonical({**cell.deploy, **cell.load}) for cell in found] == list(
        dict.fromkeys(grid.canonical({**cell.deploy, **cell.load}) for cell in found)
    )
    assert {grid.canonical(cell.variables) for cell in found} == wanted
    assert len({cell.id for cell in found}) == len(found)
    assert all(cell.id and "/" not in cell.id and not cell.id.startswith(".") and len(cell.id) <= 80 for cell in found)
    assert [grid.Cell(**cell.to_json()) for cell in found] == found, "sweep.json gives the cells back"


def test_a_baseline_has_the_same_load_on_as_many_gpus() -> None:
    (cell,) = cells(grid={"ratio": ["3p1d"], "transfer_backend": ["nixl"], "concurrency": [8]}, fixed={"engine": "emulated"})
    beside = grid.baseline_of(cell, 8, 2)
    assert beside is not None
    assert beside.deploy == {"ratio": "4agg", "engine": "emulated"}
    assert beside.load == cell.load
    assert beside.baseline
    assert grid.baseline_of(cell, 3, 2) is None


def test_all_configurations_get_the_same_requests_and_no_run_those_of_the_run_before() -> None:
    found = cells(grid={"ratio": ["1p1d", "agg"], "concurrency": [1, 2], "isl": [8, 16]})
    numbers = grid.loads(found)
    seeds = {(cell.id, repeat): grid.seed(cell, repeat, numbers) for cell in found for repeat in (1, 2)}
    assert all(seeds[f"1p1d-{load}", repeat] == seeds[f"agg-{load}", repeat] for load in ("c1-i8", "c2-i16") for repeat in (1, 2))
    assert len(set(seeds.values())) == 8


@pytest.mark.parametrize("path", sorted(Path(__file__).resolve().parents[2].glob("sweeps/*.yml")), ids=lambda path: path.stem)
def test_a_shipped_sweep_can_be_read_and_is_named_as_its_file(path: Path) -> None:
    assert spec.read(path).name == path.stem


def test_the_vllm_sweep_is_the_suite_s_grid() -> None:
    path = Path(__file__).resolve().parents[2] / "sweeps" / "vllm-xpyd.yml"
    found = grid.cells(spec.read(path), "inventory/vllm-xpyd")
    loads = {(c.load["bench_concurrency"], c.load["bench_input_len"], c.load["bench_output_len"]) for c in found}
    assert loads == set(itertools.product((1, 2, 4, 8), (256, 512, 1024), (512, 1024, 2048)))
    assert len(found) == 2 * len(loads)
    assert yaml.safe_load(path.read_text())["requests"] == 100
