"""Virtualenvs that tests need (the real router, supervisord): made once under .pd/test by the project's own installer."""

from __future__ import annotations

import base64
import os
import time
from pathlib import Path

import pytest

from pdlib import venvs
from pdlib.errors import UserError

REPO = Path(__file__).resolve().parents[1]
HOME = REPO / ".pd" / "test"


def venv_python(name: str, requirements: str) -> str:
    """The Python of a virtualenv with one requirement file; skips where it cannot be installed."""
    rows = [{"name": name, "requirements": [requirements]}]
    files = {requirements: base64.b64encode((REPO / requirements).read_bytes()).decode()}
    resumed, end = False, time.monotonic() + 300
    while time.monotonic() < end:
        try:
            outcome = venvs.step(str(HOME / "install"), str(HOME / "state"), "", rows, files, False, resumed)
        except UserError as error:
            pytest.skip(f"{name} cannot be installed here: {error}")
        if outcome.done:
            return str(HOME / "install" / name / "bin" / "python")
        resumed = True
    pytest.skip(f"{name} was not installed within 300 s")


def router_python() -> str:
    """The real router's Python (PD_ROUTER_PYTHON, or installed here)."""
    return os.environ.get("PD_ROUTER_PYTHON") or venv_python("sglang-router", "requirements/router-sglang-router.txt")


def supervisor_python() -> str:
    """supervisord's Python."""
    return venv_python("supervisor", "requirements/supervisor.txt")
