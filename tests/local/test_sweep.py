"""Sweeps by the command that a user types: every shipped one is planned for its inventory, and what is wrong touches nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pdbench.sweep import grid, planning, plays, spec

REPO = Path(__file__).resolve().parents[2]
PDBENCH = Path(sys.executable).with_name("pdbench")

#: file -> inventory of cells that name none, cells, repeats, deployments
SHIPPED = {
    "local-demo": ("inventory/local", 16, 2, 4),
    "h200x8-ratios": ("inventory/h200x8", 12, 3, 4),
    "h200x4-qwen": ("inventory/h200-local", 20, 2, 5),
    "h200x2-qwen": ("inventory/h200-local", 6, 3, 2),
    "h200x2-backends": ("inventory/h200-local", 3, 2, 3),
    "h200x2-frontend": ("inventory/h200-local", 4, 2, 4),
    "h200x2-goodput": ("inventory/h200-local", 4, 2, 2),
    "vllm-xpyd": ("inventory/vllm-xpyd", 108, 1, 3),
    "gh200-a100": ("inventory/local", 8, 2, 4),
}


def sweep(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PDBENCH, "sweep", *args], cwd=REPO, capture_output=True, text=True, check=False)


def test_every_shipped_sweep_is_here() -> None:
    assert {path.stem for path in (REPO / "sweeps").glob("*.yml")} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_sweep_is_planned_for_its_inventory_and_beats_the_order_of_its_file(name: str, tmp_path: Path) -> None:
    inventory, cells, repeats, deployments = SHIPPED[name]
    output = tmp_path / "out"
    done = sweep(f"sweeps/{name}.yml", "-i", inventory, "--dry-run", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name}: {cells} cells x {repeats} = {cells * repeats} runs on {deployments} deployments" in done.stdout
    ours, plain = (
        [int(word) for word in re.split(r"\s{2,}", line)[1:5]]
        for line in done.stdout.splitlines()
        if line.startswith(("this order", "the file's order"))
    )
    assert ours[0] < plain[0], "fewer workers are started"
    assert ours[3] <= plain[3]
    assert not output.exists(), "--dry-run writes nothing"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grid: {ratio: [2p2d, 9p9d]}\n", "cell 9p9d: ratio 9p9d does not fit."),
        ("grid: {ratio: [agg]}\nfixed: {engine_args: {page-siez: 1}}\n", "cell agg: "),
        ("cells: [{ratio: agg, inventory: inventory/nowhere}]\n", "inventory inventory/nowhere: there is no such"),
    ],
)
def test_a_cell_that_cannot_be_is_named_before_any_host_is_touched(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "s.yml").write_text(text)
    done = sweep(str(tmp_path / "s.yml"), "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_cells_are_planned_as_plan_yml_plans_them() -> None:
    """Templates of the inventory are resolved with the cell's variables, and the plan is the one that the verb writes."""
    found = grid.cells(spec.parse({"grid": {"ratio": ["3p1d", "1p1d"]}}, "s", "s"), "inventory/local")
    planned = planning.make(found, True, lambda where, deployments: plays.resolve(where, deployments, None))
    assert [cell.id for cell in planned.cells] == ["3p1d", "1p1d", "4agg", "2agg"]
    made = planned.plans[found[0].deployment]
    assert {name: entry["state_dir"] for name, entry in made["hosts"].items()} == {
        name: str(REPO / ".pd" / f"state-{name}") for name in ("gh200", "a100")
    }
    assert [worker["name"] for worker in made["workers"]] == ["prefill-0", "prefill-1", "prefill-2", "decode-0"]
    after = planned.replan(found[1].deployment, planned.replan(found[0].deployment, None))
    assert [worker["name"] for worker in after["workers"]] == ["prefill-0", "decode-0"], "placement is sticky"
