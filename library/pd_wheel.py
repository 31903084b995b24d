#!/usr/bin/python
"""pdbench's wheel for the hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
module: pd_wheel
short_description: Build pdbench's wheel from this checkout when its sources changed
description: [Runs on the controller; hosts install the wheel, so that they need no checkout.]
options:
  root: {description: The checkout., type: path, required: true}
  python: {description: A Python with pip., type: path, required: true}
attributes:
  check_mode: {support: full, description: The wheel is built in check mode, too; it is a file of the controller's.}
  diff_mode: {support: none, description: A wheel has no readable difference.}
author: [the pd project]
"""

EXAMPLES = r"""
- name: The wheel of pdbench
  pd_wheel: {root: "{{ playbook_dir | dirname }}", python: "{{ ansible_playbook_python }}"}
  delegate_to: localhost
  register: _wheel
"""

RETURN = r"""
path: {description: The wheel., returned: always, type: str, sample: .pd/dist/0123456789ab/pdbench-0.1.0-py3-none-any.whl}
"""

import fcntl
import hashlib
import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Build when the sources' hash has no wheel yet."""
    module = AnsibleModule(
        argument_spec={"root": {"type": "path", "required": True}, "python": {"type": "path", "required": True}},
        supports_check_mode=True,
    )
    root = Path(module.params["root"])
    sources = [root / "bench" / "pyproject.toml", root / "bench" / "README.md"]
    sources += [path for path in (root / "bench" / "pdbench").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    dist = root / ".pd" / "dist"
    folder = dist / digest.hexdigest()[:12]
    dist.mkdir(parents=True, exist_ok=True)
    with open(dist / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = not list(folder.glob("*.whl"))
        if built:
            for old in dist.glob("*/"):
                shutil.rmtree(old)
            command = [module.params["python"], "-m", "pip", "wheel", "-q", "--no-deps", "--disable-pip-version-check"]
            module.run_command([*command, "-w", str(folder), str(root / "bench")], check_rc=True)
    wheel = next(folder.glob("*.whl"))
    module.exit_json(changed=False, built=built, path=str(wheel))


if __name__ == "__main__":
    main()
