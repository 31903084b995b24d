"""Nothing of ours listens on all addresses unless `listen_address` says so: every shipped inventory's plan, and our own code."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import pytest
from unit.test_scenarios import read, typed

from pdlib import flags

REPO = Path(__file__).resolve().parents[2]
Json = dict[str, Any]
EVERYWHERE = ("0.0.0.0", "::", "[::]", "*")
#: What an inventory leaves to the hosts or to the environment, for a plan that contacts no host.
TYPED = {"h200-local": ("-e", "gpus=4"), "slurm": ("-e", "ratio=1p1d")}
INVENTORIES = sorted(path.parent.name for path in (REPO / "inventory").glob("*/hosts.yml"))
ROUTERS = {"sglang-router": "0.3.2", "smg": "1.13.0", "vllm-router": "0.1.17"}
#: Flags at which a server listens, whatever their default is.
LISTENS = {"--host", "--prometheus-host"}
#: Where the word stands to be recognised or, on a person's command line, asked for.
KNOWS = {"processes.py", "doctor_look.py", "doctor_reach.py", "doctor_exposure.py", "share_options.py"}


@functools.cache
def planned(inventory: str, *more: str) -> Json:
    done, plan = typed(inventory, *TYPED.get(inventory, ()), *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return plan


@pytest.fixture(autouse=True)
def allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "localhost")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURM_JOB_ID", "7")


def processes(plan: Json) -> list[tuple[Json, set[str]]]:
    """Every process of a plan, with the flags that it has and its parser knows."""
    table = flags.load(plan["engine"], plan["engine_version"])
    found = [(rank, {f"--{name}" for name in table.flags}) for worker in plan["workers"] for rank in worker["ranks"]]
    name = "sglang-router" if plan["router"]["name"] == "mini-lb" else plan["router"]["name"]
    router = flags.load_router(name, ROUTERS[name])
    return [*found, (plan["router"], {f"--{flag}" for flag in router.flags})]


@pytest.mark.parametrize("inventory", INVENTORIES)
def test_every_process_of_a_shipped_inventory_listens_at_its_address_alone(inventory: str) -> None:
    plan = planned(inventory)
    for entry, known in processes(plan):
        members = entry.get("members") or []
        said = read(entry["argv"][: len(entry["argv"]) - len(members)])
        assert entry["listen"] == entry["address"] not in EVERYWHERE
        for flag in LISTENS & known:
            # without it, vLLM and both routers listen on all addresses
            assert said[flag] == entry["address"], (entry["unit"], flag)
        assert not {*EVERYWHERE} & {*said.values(), *entry["env"].values()}
        if "side_channel_port" in entry:
            assert entry["env"]["VLLM_NIXL_SIDE_CHANNEL_HOST"] == entry["address"]
        if plan["engine"] == "sglang" and "health_url" in entry:
            # ZMQ binds there, and the bootstrap server to --host
            assert entry["env"]["SGLANG_HOST_IP"] == entry["address"]


def test_what_a_router_opens_on_all_addresses_by_default_is_known_and_set_or_off() -> None:
    for name, version in ROUTERS.items():
        table = flags.load_router(name, version)
        wide = {f"--{flag}" for flag, row in table.flags.items() if row.get("default") in EVERYWHERE and "host" in flag}
        # the mesh of several routers is off
        assert wide <= LISTENS | {"--mesh-host"}, name
        assert "--mesh-host" not in wide or table.flags["enable-mesh"]["default"] is False


def test_listen_address_is_how_one_asks_for_all_of_them() -> None:
    plan = planned("gh200-pair", "-e", "listen_address=0.0.0.0")
    for entry, _ in processes(plan):
        assert read(entry["argv"][: len(entry["argv"]) - len(entry.get("members") or [])])["--host"] == "0.0.0.0"
        # what others are told stays the address
        assert entry["address"] != "0.0.0.0"
        assert "0.0.0.0" not in entry["env"].values()
    assert "0.0.0.0" not in [worker["url"] for worker in plan["workers"]]


def test_our_own_servers_have_no_wildcard_in_their_code() -> None:
    found = set()
    for folder in ("library", "plugins", "roles", "bench/pdbench"):
        for path in (REPO / folder).rglob("*.py"):
            words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            if words & {"0.0.0.0", "::"}:
                found.add(path)
    assert {path for path in found if not str(path).endswith(tuple(KNOWS))} == set()
    assert len(found) == len(KNOWS), "one that no longer has it need not be listed"
