"""Four real systemd hosts for the session: h1, h2 and h3 serve (h3 has the router), h4 sends load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import base, hosts, network
from lab.common import REPO, known, load, locked, run
from lab.controller import Controller, controller, counts, pids
from real import helpers

COUNT = 4
#: Asks a virtualenv's Python where it and its packages come from.
FOLDERS = "import sys, sysconfig; print(sys.base_prefix, sysconfig.get_path('purelib'), sep='\\n')"


def real_engine() -> dict[str, Path]:
    """What the hosts see of this machine for inventory-sglang; {} where make test-real was never run."""
    model = REPO / ".pd" / "tiny-model"
    try:
        python, env = helpers.engine_python()
    except pytest.skip.Exception:
        return {}
    if not (model / "config.json").exists():
        return {}
    base_python, packages = run(python, "-c", FOLDERS, env=env).stdout.splitlines()
    return {
        "/srv/python": Path(base_python),
        "/srv/sglang": Path(packages),
        "/srv/shim": REPO / "tests" / "real" / "shim",
        "/srv/model": model,
    }


@pytest.fixture(scope="session")
def lab() -> Iterator[None]:
    reason = base.unfit()
    if reason:
        pytest.skip(reason)
    with locked():
        hosts.down()
        try:
            hosts.up(COUNT, real_engine())
            yield
        finally:
            hosts.down()


@pytest.fixture(autouse=True)
def whole(lab: None) -> Iterator[None]:
    """After every test: cables in, no cuts, no limits, all hosts on."""
    yield
    network.heal()
    for host in known():
        if "relay" in load(host):
            network.unshape(host)
    hosts.up(COUNT)


@pytest.fixture(scope="session")
def pd(lab: None) -> Iterator[Controller]:
    """The controller; what it has deployed stays from test to test of a module."""
    with controller() as made:
        yield made


@pytest.fixture
def serving(pd: Controller) -> Controller:
    """The controller with the inventory's deployment (3p1d) in service; made where it is not."""
    try:
        if len(pids()) == 5 and counts() == {"prefill": 3, "decode": 1}:
            return pd
    except OSError:
        pass
    pd.play("deploy_pd.yml").good()
    return pd
