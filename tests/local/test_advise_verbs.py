"""`pdbench advise` by the command that a user types, on inventories of the checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pdbench.advise import where
from pdlib.errors import UserError

REPO = Path(__file__).resolve().parents[2]
PDBENCH = Path(sys.executable).with_name("pdbench")


def advise(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PDBENCH, "advise", *args], cwd=REPO, capture_output=True, text=True, check=False)


def test_every_ratio_of_the_default_inventory_is_ranked(tmp_path: Path) -> None:
    load = ("-e", "bench_concurrency=8", "-e", "bench_num_requests=40", "-e", "bench_output_len=8", "-e", "bench_slo_ttft_ms=400")
    done = advise(*load, "--seeds", "3", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a prediction by simulation; nothing was measured. It rests on:\n  profile tiny")
    (point,) = json.loads((tmp_path / "advice.json").read_text())["points"]
    assert sorted(one["ratio"] for one in point["ratios"]) == sorted([*(f"{p}p{8 - p}d" for p in range(1, 8)), "8agg"])
    assert point["goal"] == "goodput_per_gpu"
    assert point["slo"] == {"ttft_ms": 400.0}
    assert point["load"]["concurrency"] == 8
    assert (tmp_path / "advice.png").read_bytes().startswith(b"\x89PNG")


def test_layouts_are_those_of_the_plan() -> None:
    found = where.candidates(
        "inventory/local", None, {"emulated_profile": "h200-qwen2.5-3b", "tensor_parallel_size": 2}, ["1p1d", "4agg"], []
    )
    split, together = found.layouts
    assert split.ways == (("cuda_ipc",),) or split.ways == (("tcp",),)
    assert (split.gpus, together.gpus) == (4, 8)
    assert found.profiles.keys() == {"h200-qwen2.5-3b"}
    over = where.candidates("inventory/local", None, {}, ["5p3d"], ["tiny", "gh200=h200-qwen2.5-3b"]).layouts[0]
    assert {spot.profile for spot in (*over.prefill, *over.decode)} == {"tiny", "h200-qwen2.5-3b"}
    assert {way for row in over.ways for way in row} == {"cuda_ipc", "tcp"}, "InfiniBand and RoCE have no RDMA path"


def test_an_inventory_that_leaves_things_to_be_found_is_one_host_or_refused() -> None:
    given = {"gpus": 2, "engine_args": {"max-total-tokens": 50000}}
    found = where.candidates("inventory/h200-local", None, given, [], ["h200-qwen2.5-3b"])
    assert [one.ratio for one in found.layouts] == ["1p1d", "2agg"]
    assert dict(found.layouts[0].prefill[0].flags) == {"max-total-tokens": 50000.0, "mem-fraction-static": 0.85}
    with pytest.raises(UserError, match="gpus is not declared for host h200"):
        where.candidates("inventory/h200-local", None, {}, [], ["h200-qwen2.5-3b"])
    with pytest.raises(UserError, match="--profile is missing"):
        where.candidates("inventory/h200-local", None, given, [], [])
    with pytest.raises(UserError, match="no worker host is called nobody"):
        where.candidates("inventory/h200-local", None, given, [], ["nobody=tiny"])
    with pytest.raises(UserError, match="does not fit"):
        where.candidates("inventory/h200-local", None, given, ["2p2d"], ["tiny"])
