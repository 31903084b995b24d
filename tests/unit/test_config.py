"""Ansible's configuration, the verbs' syntax, and which of a variable's values wins."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
VERBS = sorted(path.name for path in REPO.glob("*.yml"))
PLAYS = sorted(f"playbooks/{path.name}" for path in (REPO / "playbooks").glob("*.yml"))


def run(folder: Path, tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of Ansible's commands in a checkout, with that checkout's configuration and nobody else's."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    return subprocess.run(
        [str(BIN / tool), *arguments],
        cwd=folder,
        env={**env, "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a verb needs; links would lead the action plugins back to the original."""
    for name in ("ansible.cfg", *VERBS):
        shutil.copy2(REPO / name, tmp_path / name)
    for name in ("group_vars", "inventory", "library", "playbooks", "plugins", "roles"):
        shutil.copytree(REPO / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def add(path: Path, values: dict[str, Any]) -> None:
    """Set variables in a YAML file of variables."""
    path.write_text(yaml.safe_dump({**(yaml.safe_load(path.read_text()) or {}), **values}))


def test_ansible_knows_every_key_of_the_configuration() -> None:
    done = run(REPO, "ansible-config", "validate", "-t", "all")
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_key_of_the_configuration_would_be_noticed(tmp_path: Path) -> None:
    text = (REPO / "ansible.cfg").read_text()
    (tmp_path / "ansible.cfg").write_text(text.replace("[defaults]", "[defaults]\nprecedense = all_inventory", 1))
    done = run(tmp_path, "ansible-config", "validate", "-t", "all")
    assert done.returncode != 0
    assert "precedense" in done.stdout + done.stderr


def test_every_verb_and_every_play_is_good_syntax() -> None:
    done = run(REPO, "ansible-playbook", "--syntax-check", *VERBS, *PLAYS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr


def test_a_verb_imports_its_play_and_does_nothing_else() -> None:
    for name in VERBS:
        (only,) = yaml.safe_load((REPO / name).read_text())
        assert set(only) == {"name", "ansible.builtin.import_playbook"}, name
        assert (REPO / only["ansible.builtin.import_playbook"]).is_file(), name


@pytest.mark.parametrize(("ratio", "plays", "first"), [("auto", 1, "A ratio is chosen"), ("3p1d", 4, "Check what was asked for")])
def test_bench_chooses_a_ratio_or_measures_one(ratio: str, plays: int, first: str) -> None:
    done = run(REPO, "ansible-playbook", "bench.yml", "--list-tasks", "-e", f"ratio={ratio}")
    assert done.returncode == 0, done.stderr
    found = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("play #")]
    assert len(found) >= plays
    assert (len(found) == 1) == (ratio == "auto")
    assert first in found[0]


def test_a_teardown_takes_the_lock_whatever_the_limit_leaves_out() -> None:
    """A play over the router's host alone is skipped where that is outside the limit."""
    plays = yaml.safe_load((REPO / "playbooks" / "teardown.yml").read_text())
    locks = [play for play in plays for task in play["tasks"] if "lock" in json.dumps(task.get("ansible.builtin.import_role"))]
    assert [play["hosts"] for play in locks] == ["all"]
    assert plays.index(locks[0]) == 1, "before anything is fetched or ended"


def test_plays_see_the_top_level_group_vars_through_a_link() -> None:
    link = REPO / "playbooks" / "group_vars"
    assert link.is_symlink()
    assert os.readlink(link) == "../group_vars"
    assert (link / "all.yml").is_file()


# What inputs.yml resolves and auto.yml chooses, the sweep judges: they refuse nothing by themselves.
@pytest.mark.parametrize("playbook", [*VERBS, *sorted({*PLAYS} - {"playbooks/inputs.yml", "playbooks/auto.yml"})])
def test_group_vars_apply_to_every_verb_and_to_its_play_run_directly(checkout: Path, playbook: str) -> None:
    add(checkout / "group_vars" / "all.yml", {"worker_port_base": "from group_vars"})
    # rebalance.yml goes nowhere without a ratio
    done = run(checkout, "ansible-playbook", playbook, *(["-e", "ratio=2p2d"] if "rebalance" in playbook else []))
    assert done.returncode != 0
    text = " ".join((done.stdout + done.stderr).split())
    assert "worker_port_base='from group_vars' (host gh200, inventory or group_vars): expected a whole number" in text


@pytest.mark.parametrize("playbook", ["plan.yml", "playbooks/plan.yml"])
def test_an_inventory_wins_over_group_vars_and_extra_vars_win_over_both(checkout: Path, playbook: str) -> None:
    add(
        checkout / "group_vars" / "all.yml",
        {"router_policy": "random", "router_port": 9001, "worker_port_base": 9011, "engine_env": {"FROM": "group_vars"}},
    )
    hosts = checkout / "inventory" / "local" / "hosts.yml"
    inventory = yaml.safe_load(hosts.read_text())
    inventory["all"]["vars"].update(router_port=9002, worker_port_base=9012)
    hosts.write_text(yaml.safe_dump(inventory, sort_keys=False))
    add(checkout / "inventory" / "local" / "host_vars" / "gh200.yml", {"engine_env": {"FROM": "host_vars"}})
    done = run(checkout, "ansible-playbook", playbook, "-e", "worker_port_base=9013", "-e", "plan_dir=out", "-e", "ratio=1p1d")
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads((checkout / "out" / "plan.json").read_text())
    argv = plan["router"]["argv"]
    assert argv[argv.index("--policy") + 1] == "random"
    assert plan["router"]["port"] == 9002
    ranks = {rank["host"]: rank for worker in plan["workers"] for rank in worker["ranks"]}
    assert {rank["port"] for rank in ranks.values()} == {9013}
    assert {host: rank["env"]["FROM"] for host, rank in ranks.items()} == {"gh200": "host_vars", "a100": "group_vars"}
