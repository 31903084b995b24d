"""Make a host's virtualenvs, and send it the wheels for them where it reaches no registry."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "library" / "module_utils"))
sys.path.insert(0, str(ROOT))

from plugins.action import pd_poll  # noqa: E402

from pdlib import wheelhouse  # noqa: E402
from pdlib.errors import UserError  # noqa: E402
from pdlib.venvs import Venv  # noqa: E402

#: for all virtualenvs of a host
_LONGEST_S = 7200.0


class ActionModule(pd_poll.ActionModule):
    """`pd_install: {install_dir: /opt/pd, state_dir: /var/lib/pd, venvs: [...], ...}`; documented in library/pd_install.py."""

    _VALID_ARGS = frozenset({"install_dir", "state_dir", "venvs", "python", "installed", "wheelhouse", "shared"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return what was installed; a host whose virtualenvs are as wanted is not contacted."""
        super(pd_poll.ActionModule, self).run(tmp, task_vars)
        args, variables = self._task.args, task_vars or {}
        self._python, self._rows, self._sent = args["python"], list(args["venvs"]), ""
        self._files = pd_poll.contents([step for row in self._rows for step in row["requirements"]])
        files = pd_poll.encoded(self._files)
        venvs = [Venv(args["install_dir"], args["state_dir"], self._python["path"], row, files) for row in self._rows]
        if all(args["installed"].get(venv.name) == venv.stamp() for venv in venvs):
            return {"changed": False, "changes": [], "seconds": 0.0}
        arguments = {name: args[name] for name in ("install_dir", "state_dir")}
        arguments |= {"python": self._python["path"], "venvs": self._rows, "files": files, "shared": bool(args.get("shared"))}
        if args.get("wheelhouse"):
            arguments["wheelhouses"] = {row["name"]: self._identity(row) for row in self._rows if self._steps(row)}
        try:
            return self.poll("pd_venv", arguments, variables, _LONGEST_S)
        except UserError as error:
            raise AnsibleActionFail(str(error)) from None
        finally:
            if self._sent:
                self._remove_tmp_path(self._sent, force=True)

    @staticmethod
    def _steps(row: dict[str, Any]) -> list[str]:
        """The requirement files that need a registry; pdbench's own wheel goes to hosts as it is."""
        return [step for step in row["requirements"] if step != "pdbench"]

    def _target(self) -> wheelhouse.Target:
        return wheelhouse.Target(self._python["version"], self._python["machine"], self._python["glibc"])

    def _contents(self, row: dict[str, Any]) -> dict[str, bytes]:
        return {step: self._files[step.removeprefix("no-deps:")] for step in self._steps(row)}

    def _identity(self, row: dict[str, Any]) -> str:
        return wheelhouse.identity(row["name"], self._steps(row), self._contents(row), self._target())

    def supply(self, lacks: list[str], host: str) -> dict[str, Any]:
        """Fetch the wheelhouses that the host lacks, where the controller has them not, and send them."""
        rows = {self._identity(row): row for row in self._rows if self._steps(row)}
        said = pd_poll.Paced(host)
        self._sent = self.own_folder()
        archives = {}
        # What `make bundle` put beside the checkout, for a controller that reaches no registry itself.
        own = pd_poll.ROOT / ".wheels"
        for house in lacks:
            row = rows[house]
            local = wheelhouse.archive(
                pd_poll.ROOT / ".pd" / "wheelhouse", row["name"], self._steps(row), self._contents(row), self._target(), said.say,
                own if own.is_dir() else None,
            )  # fmt: skip
            remote = self._connection._shell.join_path(self._sent, local.name)
            size = f"{local.stat().st_size / 1e6:.0f} MB"
            with self.heartbeat(host, f"wheels of {row['name']} are sent ({size})"):
                self._transfer_file(str(local), remote)
            archives[house] = remote
        self._fixup_perms2([self._sent, *archives.values()])
        return {"archives": archives}
