"""What plans are made from, for many sets of extra-vars at once, so that a sweep is planned without a play for each."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ansible import context
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "library" / "module_utils"))

from pdlib import keys, plan_inputs, settings  # noqa: E402
from pdlib.errors import UserError  # noqa: E402
from pdlib.variables import VARIABLES  # noqa: E402

#: Stands for a secret that is set: plans only ask whether there is one.
SET = "set"


class ActionModule(ActionBase):
    """`pd_inputs: {cases: FILE, dest: FILE}`; documented in library/pd_inputs.py."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset({"cases", "dest"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write the inputs of every case; no host is contacted."""
        super().run(tmp, task_vars)
        variables = task_vars or {}
        groups = {name: list(hosts) for name, hosts in variables["groups"].items()}
        hosts = list(dict.fromkeys(host for group in plan_inputs.GROUPS for host in groups.get(group, [])))
        raw = {host: dict(variables["hostvars"].raw_get(host)) for host in hosts}
        try:
            plan_inputs.check_group_names(groups)
            settings.check_inventory_names({host: self._own_names(values) for host, values in raw.items()})
        except UserError as error:
            raise AnsibleActionFail(str(error)) from None
        cases = json.loads(Path(self._task.args["cases"]).read_text())
        found = {
            "groups": {name: groups[name] for name in plan_inputs.GROUPS},
            "limit": list(variables["ansible_play_hosts_all"]) if context.CLIARGS.get("subset") else None,
            "cases": [{host: self._given(raw[host], case) for host in hosts} for case in cases],
        }
        # Inventories may hold passwords under names of ours.
        with open(os.open(self._task.args["dest"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(found, file)
        return {"changed": False}

    def _given(self, raw: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
        """Return a host's values of our variables as they would be with ``case`` as extra-vars."""
        known = {**raw, **case}
        templar = self._templar.copy_with_new_env(available_variables=known)
        given = {}
        for name in known.keys() & VARIABLES.keys():
            value = case[name] if name in case else templar.template(known[name])
            given[name] = f"{SET}-{name}" if VARIABLES[name].secret and value is not None else value
        for name, variable in keys.ENVIRONMENT.items():
            if given.get(name) is None and os.environ.get(variable):
                given[name] = f"{SET}-{name}"
        return given

    @staticmethod
    def _own_names(values: dict[str, Any]) -> list[str]:
        magic = {"groups", "group_names", "omit", "playbook_dir", "role_names", "role_name", "play_hosts", "environment"}
        return [n for n in values if n not in magic and not n.startswith(("ansible_", "inventory_", "pd_", "_"))]
