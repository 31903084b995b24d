"""README's table of what runs where: each combination that it calls rendered and parsed is rendered and parsed here."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from unit.plans import Json, host, plan

from pdlib import engines, flags, routers, units

REPO = Path(__file__).resolve().parents[2]
ROUTER = {"MiniLB": "mini-lb"}
BACKEND = {"NIXL": "nixl", "Mooncake RDMA": "mooncake", "Mooncake TCP": "mooncake_tcp", "Ascend": "ascend"}
IMAGE = {"engine_image": f"x/engine:v1@sha256:{'0a' * 32}"}
RUNTIME: dict[str, Json] = {"venv": {}, "existing": {"engine_python": "/opt/env"}, "docker": IMAGE, "podman": IMAGE}


def rows() -> list[list[str]]:
    """The cells of the table's rows."""
    text = (REPO / "README.md").read_text().partition("## What runs where today")[2]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def combinations() -> list[tuple[str, ...]]:
    """(engine, version, router, backend, runtime, service manager) of everything that is said to be rendered."""
    found: list[tuple[str, ...]] = []
    for engine, router, backend, runtime, manager, state in rows():
        if state != "rendered and parsed only":
            continue
        name, _, versions = engine.partition(" ")
        cells = [cell.split(", ") for cell in (versions, router, backend, runtime, manager)]
        found += [(name.lower(), *choice) for choice in itertools.product(*cells)]
    return found


def parsed(argv: list[str], table: flags.FlagTable) -> None:
    """Fail unless every flag of a command line is one that the recorded parser takes, with its number of values."""
    items: dict[str, list[str]] = {}
    for item in argv:
        if item.startswith("--"):
            items[item.removeprefix("--")] = []
        elif items:
            items[list(items)[-1]].append(item)
    for name, values in items.items():
        row = table.flags[name]
        assert (not values) is (row["type"] == "bool"), (name, values)
        given: Any = values if row["nargs"] in ("+", "*") else (True if not values else values[0])
        flags.canonical(table, {name: given}, "argv", {})


@pytest.mark.parametrize("manager", ["systemd", "supervisord"])
@pytest.mark.parametrize("runtime", RUNTIME)
def test_every_combination_that_is_said_to_be_rendered_is_and_its_parsers_take_it(runtime: str, manager: str) -> None:
    chosen = [each for each in combinations() if each[4:] == (runtime, manager)]
    assert len(chosen) > 10
    own: Json = {
        "runtime": runtime,
        "service_manager": manager,
        "rdma_fabric": "infiniband",
        "tcp_device": "eth0",
        "rdma_devices": ["mlx5_0"],
        **RUNTIME[runtime],
    }
    hosts = {"n1": host(1, **own), "n2": host(2, **own)}
    for engine, version, router, backend, _, _ in chosen:
        facts = routers.router(ROUTER.get(router, router))
        made = plan(
            hosts, "1p1d", engine=engine, engine_version=version, model="m", router=facts.name, transfer_backend=BACKEND[backend],
            prefill=["n1"], decode=["n2"], router_policy="random",
        )  # fmt: skip
        assert (made["engine"], made["engine_version"], made["transfer_backend"]) == (engine, version, BACKEND[backend])
        table = flags.load(engine, version)
        for worker in made["workers"]:
            argv = worker["ranks"][0]["argv"]
            start = argv.index("-m") + (4 if engine == "vllm" else 2)
            parsed(argv[start:], table)
        own_flags = made["router"]["argv"][made["router"]["argv"].index("-m") + 2 :]
        parsed(own_flags, flags.load_router(facts.package, facts.version))
        for name in hosts:
            files = units.rendered_files(made, name)
            assert any(file.endswith(".service" if manager == "systemd" else ".conf") for file in files), files


def test_the_versions_and_routers_of_the_table_are_those_that_there_are() -> None:
    said = combinations()
    for engine in ("sglang", "vllm"):
        assert {version for name, version, *_ in said if name == engine} == set(flags.versions(engine)) - {"0.32.0"}
    assert {ROUTER.get(router, router) for _, _, router, *_ in said} == set(routers.ROUTERS)
    assert {BACKEND[backend] for name, _, _, backend, *_ in said if name == "sglang"} == set(
        engines.engine("sglang").transfer_backends
    )
    for row in rows():
        for router in row[1].split(", "):
            name, _, version = router.partition(" ")
            assert not version or version == routers.router(ROUTER.get(name, name)).version
        assert row[5].startswith(
            ("run on GPUs", "run on CPU", "run, without GPUs", "run as processes", "rendered and parsed only")
        )
