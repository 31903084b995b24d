"""A deployment of the real engine on this machine's CPU, made by the user's own verbs, and gone when the tests are."""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
from local.conftest import REPO, Checkout, Play
from real import helpers

from pdlib import processes

KEY, ADMIN_KEY = "real-3ngine-key", "real-4dmin-key"


class Real:
    """A checkout in which inventory/local-sglang is deployed; installs and model are those of the repository."""

    def __init__(self, checkout: Checkout):
        self.checkout = checkout
        base = checkout.router_port
        extra = {
            "router_port": base,
            "router_prometheus_port": base + 1,
            "worker_port_base": base + 2,
            "bootstrap_port_base": base + 20,
            "install_dir": REPO / ".pd" / "install-cpu",
            "model": REPO / ".pd" / "tiny-model",
        }
        # Typed, they would stand in `ps`, and are refused.
        secret = checkout.folder / "secret.json"
        secret.write_text(json.dumps({"api_key": KEY, "admin_api_key": ADMIN_KEY}))
        self.options = ["-e", f"@{secret}", *(item for name, value in extra.items() for item in ("-e", f"{name}={value}"))]

    def words(self, verb: str, *arguments: str) -> list[str]:
        """The command line of a verb, after `ansible-playbook`."""
        return [verb, "-i", "inventory/local-sglang", *self.options, *arguments]

    def play(self, verb: str, *arguments: str) -> Play:
        return self.checkout.play(*self.words(verb, *arguments), timeout=800)

    def measured(self, *arguments: str) -> Play:
        """A bench.yml with a valid run."""
        return self.checkout.measured(*self.words("bench.yml", *arguments)[1:], timeout=800)

    def plan(self) -> dict[str, Any]:
        """The deployed plan."""
        content: dict[str, Any] = json.loads((self.checkout.state("cpu") / "plan.json").read_text())
        return content

    def greedy(self, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        return helpers.greedy(self.checkout.url, prompts, output_tokens, api_key=KEY)


def extra(variables: Mapping[str, object]) -> list[str]:
    """Variables as words of a command line; what is no text or number goes as JSON."""
    return ["-e", json.dumps(dict(variables))]


class Deployment(Protocol):
    """A checkout, and how its deployment is reached by verbs."""

    checkout: Checkout

    def play(self, verb: str, *arguments: str) -> Play: ...


def checkout() -> Checkout:
    """A checkout of its own, in a folder that goes with the deployment."""
    return Checkout(Path(tempfile.mkdtemp(prefix="pd-real-")))


@contextlib.contextmanager
def standing(made: Deployment) -> Iterator[None]:
    """Deploy for as long as the block lasts; then nothing of it is left, the checkout's folder included."""
    try:
        made.play("deploy_pd.yml").good()
        yield
    finally:
        made.play("teardown.yml")
        processes.kill([int(line.split()[0]) for line in made.checkout.processes()], 5)
        shutil.rmtree(made.checkout.folder, ignore_errors=True)


@contextlib.contextmanager
def deployed(*options: str) -> Iterator[Real]:
    """1p1d, deployed with these words beside; skips where the engine cannot run."""
    if sys.version_info[:2] != (3, 11) or platform.machine() != "x86_64":
        pytest.skip("the engine's CPU requirements are for Python 3.11 on x86_64")
    if not ctypes.util.find_library("ibverbs"):
        pytest.skip("libibverbs is not installed (tools/real_packages.sh)")
    if not (REPO / ".pd" / "tiny-model" / "config.json").exists():
        pytest.skip("no model: make tiny-model")
    made = Real(checkout())
    made.options += options
    with standing(made):
        yield made
