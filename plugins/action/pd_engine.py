"""Check or fetch the engine of a host that is not in a virtualenv of ours, and send it the image's archive where there is one."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "library" / "module_utils"))
sys.path.insert(0, str(ROOT))

from plugins.action import pd_poll  # noqa: E402

#: for an image to come and be loaded
_LONGEST_S = 7200.0


def checksum(path: Path) -> str:
    """Return a large file's sha256, which is kept for as long as its size and time stay."""
    state = path.stat()
    name = hashlib.sha256(f"{path} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]
    kept = ROOT / ".pd" / "images" / f"{name}.json"
    if not kept.exists():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"file": str(path), "sha256": digest}))
    return str(json.loads(kept.read_text())["sha256"])


class ActionModule(pd_poll.ActionModule):
    """`pd_engine: {runtime: ..., state_dir: /var/lib/pd, ...}`; documented in library/pd_engine.py."""

    _VALID_ARGS = frozenset({"runtime", "state_dir", "install_dir", "service_user"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return what was pulled or loaded."""
        super(pd_poll.ActionModule, self).run(tmp, task_vars)
        variables = task_vars or {}
        arguments = dict(self._task.args)
        self._archive, self._sent = arguments["runtime"].get("archive", ""), ""
        if self._archive:
            path = ROOT / self._archive
            if not path.is_file():
                raise AnsibleActionFail(f"engine_image_archive={self._archive}: there is no such file on the controller ({path})")
            with self.heartbeat(variables["inventory_hostname"], f"reads {path.name} for its checksum"):
                arguments["archive"] = {"sha256": checksum(path), "size": path.stat().st_size}
        try:
            return self.poll("pd_runtime", arguments, variables, _LONGEST_S)
        finally:
            if self._sent:
                self._remove_tmp_path(self._sent, force=True)

    def supply(self, lacks: list[str], host: str) -> dict[str, Any]:
        """Send the archive."""
        path = ROOT / self._archive
        self._sent = self.own_folder()
        remote = str(self._connection._shell.join_path(self._sent, path.name))
        with self.heartbeat(host, f"{path.name} is sent ({path.stat().st_size / 1e9:.1f} GB)"):
            self._transfer_file(str(path), remote)
        self._fixup_perms2([self._sent, remote])
        return {"archive_path": remote}
