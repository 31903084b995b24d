"""The sudoers file of docs/security.md: it is what Ansible needs, no more, and what the lab's hosts have."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from ansible.plugins.loader import become_loader, get_shell_plugin, init_plugin_loader
from lab import base

REPO = Path(__file__).resolve().parents[2]


def rules(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith(("#", "Defaults"))]


def test_it_is_root_by_one_program_and_nobody_else_by_none() -> None:
    (rule,) = rules(base.SUDOERS)
    found = re.fullmatch(r"(\w+) ALL=\((\w+)\) NOPASSWD: (\S+)", rule)
    assert found
    assert found.groups() == (base.USER, "root", "/bin/sh")


def test_that_program_is_what_ansible_calls_as_it_is_configured_here() -> None:
    init_plugin_loader()
    sudo = become_loader.get("sudo")
    sudo.set_options()
    called = sudo.build_become_command("/usr/bin/python3", get_shell_plugin(shell_type="sh", executable="/bin/sh"))
    assert re.match(r"sudo -H -S -n +-u root /bin/sh -c '", called), called
    config = (REPO / "ansible.cfg").read_text()
    assert "pipelining = True" in config, "or `!requiretty` would be there for nothing"
    assert not re.search(r"^(become|executable)", config, re.M)


def test_no_play_becomes_anybody_by_itself() -> None:
    """Whether tasks run as root is the inventory's to say (ansible_become), and root is all that they become."""
    for path in [*(REPO / "playbooks").glob("*.yml"), *(REPO / "roles").glob("*/*/*.yml"), *(REPO / "group_vars").glob("*.yml")]:
        text = path.read_text()
        yaml.safe_load(text)
        assert not re.search(r"^\s*-?\s*(ansible_)?become(_\w+)?:", text, re.M), path


@pytest.mark.skipif(not shutil.which("visudo"), reason="there is no visudo")
def test_visudo_takes_it(tmp_path: Path) -> None:
    file = tmp_path / "ops"
    file.write_text(base.SUDOERS)
    file.chmod(0o440)
    done = subprocess.run(["visudo", "-cf", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
