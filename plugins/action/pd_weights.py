"""Bring a model to a host, a few seconds a call; and say which host gives it to which."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "library" / "module_utils"))
sys.path.insert(0, str(ROOT))

from plugins.action import pd_poll  # noqa: E402

from pdlib import models  # noqa: E402
from pdlib.errors import UserError  # noqa: E402

#: for a model to come
_LONGEST_S = 86400.0


class ActionModule(pd_poll.ActionModule):
    """`pd_weights: {action: have, model: {...}, ...}`; documented in library/pd_weights.py."""

    _VALID_ARGS = frozenset({
        "action", "model", "state_dir", "python", "source", "token", "address", "service_user", "served", "giver",
        "size",
    })  # fmt: skip

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the module's last result, or (``choose``) ``giver``, ``lacking``, ``size`` and a token for their use."""
        super(pd_poll.ActionModule, self).run(tmp, task_vars)
        variables = task_vars or {}
        if self._task.args["action"] == "choose":
            return self._choose(variables)
        return self.poll("pd_model", dict(self._task.args), variables, _LONGEST_S)

    def _choose(self, variables: dict[str, Any]) -> dict[str, Any]:
        hostvars, name = variables["hostvars"], self._task.args["model"]["name"]
        found = {
            host: dict(hostvars[host]["__pd_model"])
            for host in variables["ansible_play_hosts"]
            if "digest" in hostvars[host].get("__pd_model", {})
        }
        try:
            giver, lacking = models.choose(found, self._task.args["source"]["sha256"], name)
        except UserError as error:
            raise AnsibleActionFail(str(error)) from None
        size = found[giver]["bytes"] if giver else 0
        # Not to be shown, with however many -v.
        return {
            "changed": False, "giver": giver, "lacking": lacking, "size": size, "token": secrets.token_urlsafe(32),
            "_ansible_no_log": True,
        }  # fmt: skip
