"""Call a module that works in steps until it is done, with a line of progress after every step."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "library" / "module_utils"))

from pdlib import keys, steps  # noqa: E402
from pdlib.errors import UserError  # noqa: E402

display = Display()
#: least time between two lines of progress
QUIET_S = 4


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
            if importlib.util.find_spec("flit_core"):
                # `make setup` installed what builds it, so that no registry is asked.
                command.append("--no-build-isolation")
            # One source, one wheel: hosts that have it are left alone whichever checkout deploys to them.
            env = {**os.environ, "SOURCE_DATE_EPOCH": "946684800"}
            done = subprocess.run(
                [*command, str(bench)], env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
            )
            if done.returncode:
                raise AnsibleActionFail(f"pdbench's wheel could not be built:\n{done.stderr.strip()[-2000:]}")
    return next(folder.glob("*.whl"))


def contents(names: Sequence[str]) -> dict[str, bytes]:
    """Return files of the checkout by name; `pdbench` is the wheel made from it, `no-deps:` is not part of the path."""
    plain = [name.removeprefix("no-deps:") for name in names]
    return {name: (wheel(ROOT) if name == "pdbench" else ROOT / name).read_bytes() for name in plain}


def encoded(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return files as modules take them."""
    return {name: base64.b64encode(data).decode() for name, data in files.items()}


class Paced:
    """Lines of progress of one host, every few seconds at most."""

    def __init__(self, host: str):
        self.host, self.started, self.shown = host, time.monotonic(), time.monotonic()

    def say(self, text: str) -> None:
        """Show a line, unless one was shown just now."""
        if time.monotonic() - self.shown > QUIET_S:
            display.display(f"  [{self.host}] {time.monotonic() - self.started:4.0f} s  {text}")
            self.shown = time.monotonic()


class ActionModule(ActionBase):
    """`pd_poll: {module: pd_units, args: {...}, timeout: 600, files: [...]}`; documented in library/pd_poll.py."""

    _VALID_ARGS = frozenset({"module", "args", "timeout", "files", "keys", "keep_going"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the last step's result, with the changes of all steps."""
        super().run(tmp, task_vars)
        variables = task_vars or {}
        module, timeout = self._task.args["module"], float(self._task.args.get("timeout", 1800))
        arguments = dict(self._task.args.get("args") or {})
        if self._task.args.get("files"):
            arguments["files"] = encoded(contents(self._task.args["files"]))
        if self._task.args.get("keys"):
            arguments |= self.secrets(variables, self._task.args["keys"], arguments.get("units", []))
        return self.kept_going(variables, lambda: self.poll(module, arguments, variables, timeout))

    def secrets(
        self, variables: Mapping[str, Any], places: Mapping[str, Any], units: Sequence[Mapping[str, Any]]
    ) -> dict[str, str]:
        """Return what lies in private files of the host by name: the deployment's keys, and what units read beside them.

        What a module starts on this machine shall not inherit keys in its environment.
        """
        own = variables["hostvars"][variables["inventory_hostname"]]
        try:
            found = {name: keys.resolve(name, own.get(name), os.environ, Path(places["folder"])) for name in keys.SHARED}
        except UserError as error:
            raise AnsibleActionFail(str(error)) from None
        for name in keys.ENVIRONMENT.values():
            os.environ.pop(name, None)
        for name in (keys.CERT, keys.CERT_KEY):
            if any(keys.reads(unit, name) for unit in units):
                found[name] = self._loader.get_text_file_contents(str(ROOT / places[name]))
        if any(keys.reads(unit, keys.HUB) for unit in units):
            found[keys.HUB] = own.get(keys.HUB)
        return {name: str(key) for name, key in found.items() if key is not None}

    def kept_going(self, variables: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what ``work`` does; with `keep_going`, a host that fails or is gone is told of in ``lost``."""
        if not boolean(self._task.args.get("keep_going", False)):
            return work()
        try:
            result = work()
        except (AnsibleActionFail, AnsibleConnectionFailure) as error:
            result = {"failed": True, "msg": str(error)}
        if not (result.get("failed") or result.get("unreachable")):
            return result
        display.display(f"  [{self._task.delegate_to or variables['inventory_hostname']}] {result.get('msg')}")
        return {"changed": False, "lost": str(result.get("msg"))}

    def poll(self, module: str, arguments: dict[str, Any], variables: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Call ``module`` until it is done; return the last result, with the changes of all steps and ``seconds``."""
        host, started, shown = self._task.delegate_to or variables["inventory_hostname"], time.monotonic(), time.monotonic()
        changes: list[str] = []
        diff: list[Any] = []
        resumed = False
        while True:
            with self.heartbeat(host, f"{module} is still at it"):
                result = self._execute_module(
                    module_name=module, module_args={**arguments, "resumed": resumed}, task_vars=variables
                )
            changes += [change for change in result.get("changes", []) if change not in changes]
            diff += result.get("diff") or []
            result.update(
                changes=changes, diff=diff, changed=steps.changed(changes), seconds=round(time.monotonic() - started, 1)
            )
            result.pop("invocation", None)
            if result.get("failed") or result.get("unreachable") or result.get("done"):
                return dict(result)
            if result.get("lacks"):
                arguments = {**arguments, **self.supply(result["lacks"], host)}
                continue
            if time.monotonic() - started > timeout:
                raise AnsibleActionFail(f"not done after {timeout:.0f} s: {result.get('message', '')}")
            if result.get("message") and time.monotonic() - shown > QUIET_S:
                display.display(f"  [{host}] {time.monotonic() - started:4.0f} s  {result['message']}")
                shown = time.monotonic()
            resumed = True

    def own_folder(self) -> str:
        """Return a fresh folder on the host, of the user who connects; modules do not use it as theirs and remove it."""
        before = self._connection._shell.tmpdir
        folder = str(self._make_tmp_path())
        self._connection._shell.tmpdir = before
        return folder

    def supply(self, lacks: list[str], host: str) -> dict[str, Any]:
        """Return arguments that give the module what it lacks; no module but pd_venv lacks anything."""
        raise AnsibleActionFail(f"{host} lacks {', '.join(lacks)}")

    @staticmethod
    @contextmanager
    def heartbeat(host: str, what: str) -> Iterator[None]:
        """Say every few seconds that a step still goes on, for the rare step that takes long."""
        done, started = threading.Event(), time.monotonic()

        def beat() -> None:
            while not done.wait(9):
                display.display(f"  [{host}] {time.monotonic() - started:4.0f} s  {what}")

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
