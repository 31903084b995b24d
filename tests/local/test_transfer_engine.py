"""The role that looks after the transfer engine's system libraries, on hosts that are this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
HERE = {"package": "libc6", "rpm": "glibc", "shows": ["lib:libc.so.6"]}
#: No package manager has it, whatever it is.
NOWHERE = {"package": "pd-no-such-package", "rpm": "pd-no-such-package", "shows": ["lib:libpd-none.so.1"]}


def host(manager: str) -> dict[str, Any]:
    return {"service_manager": manager, "wheelhouse": False}


def test_what_is_missing_is_named_where_it_cannot_be_installed(tmp_path: Path) -> None:
    about = {
        "no_root": (host("supervisord"), [HERE, NOWHERE]),
        "unknown_there": (host("systemd"), [NOWHERE]),
    }
    play = {
        "hosts": "all",
        "gather_facts": False,
        "vars": {
            "pd_hosts": {name: row for name, (row, _) in about.items()},
            "pd_plan": {
                "transfer_backend": "mooncake",
                "hosts": {name: {"transfer": {"system": rows}} for name, (_, rows) in about.items()},
            },
        },
        "roles": ["transfer_engine"],
    }
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    lines = [f"{name} ansible_connection=local ansible_python_interpreter={sys.executable}" for name in about]
    (tmp_path / "hosts").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(tmp_path / "hosts"), str(tmp_path / "play.yml")],
        env={**os.environ, "ANSIBLE_CONFIG": str(REPO / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        cwd=tmp_path, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip
    said = done.stdout
    recap = {
        name: next(line for line in said.splitlines() if line.startswith(f"{name} ") and "failed=" in line) for name in about
    }
    assert done.returncode == 2, said + done.stderr
    assert all("failed=1" in line for line in recap.values()), said
    needs = "the transfer engine (mooncake) needs pd-no-such-package, which this host has not, and"
    assert f"{needs} without systemd and root nothing is installed there" in said, "and libc6, which is there, is not named"
    assert f"{needs} its package manager said: " in said
