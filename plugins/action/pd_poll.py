"""Call a module that works in steps until it is done, with a line of progress after every step."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

ROOT = Path(__file__).resolve().parents[2]
display = Display()


def wheel(root: Path) -> Path:
    """Return pdbench's wheel, built from this checkout when its sources changed; hosts install it, not a checkout."""
    bench, dist = root / "bench", root / ".pd" / "dist"
    sources = [bench / "pyproject.toml", bench / "README.md", *sorted((bench / "pdbench").rglob("*"))]
    digest = hashlib.sha256()
    for path in sources:
        if path.is_file() and path.suffix != ".pyc":
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    folder = dist / digest.hexdigest()[:12]
    dist.mkdir(parents=True, exist_ok=True)
    with open(dist / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("*.whl")):
            for old in dist.glob("*/"):
                shutil.rmtree(old)
            command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--disable-pip-version-check", "-w", str(folder)]
            # One source, one wheel: hosts that have it are left alone whichever checkout deploys to them.
            env = {**os.environ, "SOURCE_DATE_EPOCH": "946684800"}
            done = subprocess.run(
                [*command, str(bench)], env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
            )
            if done.returncode:
                raise AnsibleActionFail(f"pdbench's wheel could not be built:\n{done.stderr.strip()[-2000:]}")
    return next(folder.glob("*.whl"))


class ActionModule(ActionBase):
    """`pd_poll: {module: pd_units, args: {...}, timeout: 600, files: [...]}`; documented in library/pd_poll.py."""

    _VALID_ARGS = frozenset({"module", "args", "timeout", "files", "quiet_s"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the last step's result, with the changes of all steps."""
        super().run(tmp, task_vars)
        variables = task_vars or {}
        module, timeout = self._task.args["module"], float(self._task.args.get("timeout", 1800))
        arguments = dict(self._task.args.get("args") or {})
        names = [name.removeprefix("no-deps:") for name in self._task.args.get("files") or []]
        if names:
            paths = {name: wheel(ROOT) if name == "pdbench" else ROOT / name for name in names}
            arguments["files"] = {name: base64.b64encode(path.read_bytes()).decode() for name, path in paths.items()}
        host, started, shown = self._task.delegate_to or variables["inventory_hostname"], time.monotonic(), time.monotonic()
        changes: list[str] = []
        diff: list[Any] = []
        resumed = False
        while True:
            with self._heartbeat(host, module, started):
                result = self._execute_module(
                    module_name=module, module_args={**arguments, "resumed": resumed}, task_vars=variables
                )
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

    @staticmethod
    @contextmanager
    def _heartbeat(host: str, module: str, started: float) -> Iterator[None]:
        """Say every few seconds that a step still goes on, for the rare step that takes long."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(9):
                display.display(f"  [{host}] {time.monotonic() - started:4.0f} s  {module} is still at it")

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
