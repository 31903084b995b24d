"""Bring a run, or traces, from a host to the controller, without reading it into memory on the way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from plugins.action.pd_poll import ActionModule as Poll  # noqa: E402


class ActionModule(Poll):
    """`pd_fetch: {state_dir: /var/lib/pd, run_id: ..., dest: results/.incoming}`; documented in library/pd_fetch.py."""

    _VALID_ARGS = frozenset({"module", "state_dir", "run_id", "dest", "keep_going"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Pack on the host, as who may read the run; fetch as who connects (ansible.builtin.fetch would send it as JSON)."""
        super(Poll, self).run(tmp, task_vars)
        if self._task.check_mode:
            return {"changed": False}
        variables = task_vars or {}
        return self.kept_going(variables, lambda: self._fetch(variables))

    def _fetch(self, variables: dict[str, Any]) -> dict[str, Any]:
        args = self._task.args
        folder = self.own_folder()
        try:
            archive = self._connection._shell.join_path(folder, f"{args['run_id']}.tar.gz")
            options = {"action": "pack", "state_dir": args["state_dir"], "run_id": args["run_id"], "archive": archive}
            host = self._task.delegate_to or variables["inventory_hostname"]
            with self.heartbeat(host, f"{args['run_id']} is packed and fetched"):
                result = self._execute_module(
                    module_name=args.get("module", "pd_bench"), module_args=options, task_vars=variables
                )
                if result.get("failed") or result.get("unreachable"):
                    return dict(result)
                local = Path(args["dest"]) / f"{args['run_id']}.tar.gz"
                local.parent.mkdir(parents=True, exist_ok=True)
                self._connection.fetch_file(archive, str(local))
        finally:
            self._remove_tmp_path(folder, force=True)
        return {"changed": True, "archive": str(local)}
