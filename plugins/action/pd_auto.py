"""Choose a ratio: `pdbench advise --verify` with what the user typed, its output as it comes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ansible import context
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible.utils.vars import load_extra_vars

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "library" / "module_utils"))

from pdlib import settings  # noqa: E402
from pdlib.errors import UserError  # noqa: E402
from pdlib.variables import VARIABLES  # noqa: E402

display = Display()


class ActionModule(ActionBase):
    """`pd_auto:`; documented in library/pd_auto.py."""

    TRANSFERS_FILES = False
    _VALID_ARGS: frozenset[str] = frozenset()

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Simulate, measure, compare; return where the results are."""
        super().run(tmp, task_vars)
        try:
            return self._run(task_vars or {})
        except UserError as error:
            raise AnsibleActionFail(str(error)) from None

    def _run(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        extra = dict(load_extra_vars(loader=self._loader))
        settings.check_extra_vars(extra)
        sources = list(task_vars["ansible_inventory_sources"])
        if len(sources) != 1:
            raise UserError(f"ratio=auto takes one inventory, and there are {len(sources)}: {', '.join(sources)}")
        for name in extra:
            if name in VARIABLES and VARIABLES[name].secret:
                raise UserError(
                    f"-e {name}=...: ratio=auto keeps what it measured with, and this is a secret: put it into a vault"
                )
        given = {name: value for name, value in extra.items() if name in VARIABLES}
        results = ROOT / str(given.get("results_dir") or VARIABLES["results_dir"].default)
        folder = results / f"auto-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        profiles = settings.convert(VARIABLES["advise_profile"], task_vars.get("advise_profile") or [], "advise_profile")
        limit = context.CLIARGS.get("subset")
        with tempfile.TemporaryDirectory() as scratch:
            typed = Path(scratch) / "extra.json"
            typed.write_text(json.dumps({name: value for name, value in given.items() if name != "ratio"}))
            command = [
                self._python(),
                "-m",
                "pdbench",
                "advise",
                "-i",
                sources[0],
                "-e",
                f"@{typed}",
                "--verify",
                "--output",
                str(folder),
            ]
            command += ["-l", limit] if limit else []
            code, last = self._stream(command + [word for name in profiles for word in ("--profile", name)])
        if code == 3:
            raise UserError(f"ratio=auto: not all runs are valid ({folder / 'sweep'})")
        if code:
            raise UserError(f"ratio=auto: no ratio was chosen: {last or 'the lines above say why'}")
        return {"changed": True, "folder": str(folder)}

    @staticmethod
    def _python() -> str:
        return sys.executable if importlib.util.find_spec("pdbench") else str(ROOT / ".venv" / "bin" / "python")

    @staticmethod
    def _stream(command: list[str]) -> tuple[int, str]:
        """Run a command, show its lines as they come, return exit code and last line; one that is left behind is ended."""
        # The plays and the package of this checkout, whichever is installed.
        env = {**os.environ, "PYTHONPATH": str(ROOT / "bench"), "PYTHONUNBUFFERED": "1"}
        child = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert child.stdout
        try:
            last = ""
            for line in child.stdout:
                display.display(line.rstrip("\n"))
                last = line.strip() or last
            return child.wait(), last
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait(60)
