"""Call a module that works in steps until it is done, with a line of progress after every step."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

ROOT = Path(__file__).resolve().parents[2]
display = Display()


class ActionModule(ActionBase):
    """`pd_poll: {module: pd_units, args: {...}, timeout: 600, files: [...]}`; documented in library/pd_poll.py."""

    _VALID_ARGS = frozenset({"module", "args", "timeout", "files", "wheel", "quiet_s"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the last step's result, with the changes of all steps."""
        super().run(tmp, task_vars)
        variables = task_vars or {}
        module, timeout = self._task.args["module"], float(self._task.args.get("timeout", 1800))
        arguments = dict(self._task.args.get("args") or {})
        files = {name: ROOT / name.removeprefix("no-deps:") for name in self._task.args.get("files") or []}
        if self._task.args.get("wheel"):
            files["pdbench"] = Path(self._task.args["wheel"])
        if files:
            arguments["files"] = {
                name.removeprefix("no-deps:"): base64.b64encode(path.read_bytes()).decode() for name, path in files.items()
            }
        host, started, shown = variables["inventory_hostname"], time.monotonic(), time.monotonic()
        changes: list[str] = []
        diff: list[Any] = []
        resumed = False
        while True:
            result = self._execute_module(module_name=module, module_args={**arguments, "resumed": resumed}, task_vars=variables)
            changes += [change for change in result.get("changes", []) if change not in changes]
            diff += result.get("diff") or []
            result.update(changes=changes, diff=diff, changed=bool(changes))
            result.pop("invocation", None)
            if result.get("failed") or result.get("done"):
                return dict(result)
            if time.monotonic() - started > timeout:
                raise AnsibleActionFail(f"not done after {timeout:.0f} s: {result.get('message', '')}")
            if result.get("message") and time.monotonic() - shown > float(self._task.args.get("quiet_s", 4)):
                display.display(f"  [{host}] {time.monotonic() - started:4.0f} s  {result['message']}")
                shown = time.monotonic()
            resumed = True
