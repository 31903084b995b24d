"""One move of a change of ratio: what it is, before it; what it took, after it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "library" / "module_utils"))

from pdlib import moves, tables  # noqa: E402
from pdlib.errors import UserError  # noqa: E402

display = Display()


class ActionModule(ActionBase):
    """`pd_move: {number: 1}`; documented in library/pd_move.py."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset({"number", "made"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the move, or (with `made`) note what it took."""
        super().run(tmp, task_vars)
        variables = task_vars or {}
        number = int(self._task.args["number"])
        if boolean(self._task.args.get("made", False)):
            return self._made(number, variables)
        try:
            step = moves.step(variables["__pd_deployed"]["plan"], variables["__pd_planned"]["pd_plan"], number)
        except UserError as error:
            raise AnsibleActionFail(str(error)) from None
        if number:
            display.display(f"\nmove {number} of {step['of']}: {step['says']}; meanwhile {step['meanwhile']} serves\n")
        if step["hosts"] is None:
            step["hosts"] = list(variables["ansible_play_hosts_all"])
        return {"changed": False, **step}

    @staticmethod
    def _made(number: int, variables: dict[str, Any]) -> dict[str, Any]:
        """Print what the steps of the move took, and keep it for the table at the end."""
        units = [variables["hostvars"][host].get("__pd_units", {}) for host in variables["ansible_play_hosts_all"]]
        took = {
            "drained": variables["__pd_left"]["seconds"] if variables["__pd_step"]["leaving"] else 0.0,
            "restarted": max((float(done.get("seconds") or 0.0) for done in units), default=0.0),
            "admitted": variables["__pd_admitted"]["seconds"],
        }
        changes = [change for done in [*units, variables["__pd_admitted"]] for change in done.get("changes") or []]
        if changes and not number:
            display.display(f"\nwhat an interrupted command left is finished: {tables.grouped(changes)}")
        if number:
            shown = ", ".join(f"{what} in {tables.duration(seconds)}" for what, seconds in took.items())
            display.display(f"move {number} is made: {shown}")
        rows = [*variables.get("ansible_facts", {}).get("pd_moved", []), {"number": number, "changes": changes, **took}]
        return {"changed": False, "ansible_facts": {"pd_moved": rows}}
