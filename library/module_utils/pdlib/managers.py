"""Service managers behind one face: supervisord (containers, no root) and systemd."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import tempfile
import time
import xmlrpc.client
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Tuple, Type, Union

from . import processes
from . import units as render
from .errors import UserError, listing


@dataclass(frozen=True)
class Status:
    """A unit as its manager sees it. ``state``: running, starting, stopping, stopped or dead; ``pid`` 0 when none."""

    state: str
    pid: int
    detail: str = ""


def tail(path: Path, lines: int) -> str:
    """Return a file's last lines ('' when it is not there)."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64 * 1024))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def matching(lines: Iterable[str], pattern: str, most: int, follow: int = 0) -> str:
    """Return the first ``most`` lines that match in what the last process said in a log, each with ``follow`` lines after it."""
    wanted = re.compile(pattern)
    found: List[str] = []
    after = 0
    for line in lines:
        if line.startswith(render.STARTED):
            found, after = [], 0
        elif len(found) < most and (wanted.search(line) or after):
            after = follow if wanted.search(line) else after - 1
            found.append(line.rstrip("\n"))
    return "\n".join(found)


def since_start(text: str) -> str:
    """Return what the last process said of the end of a log."""
    before, mark, said = text.rpartition(render.STARTED)
    return f"{mark}{said}" if mark and (not before or before.endswith("\n")) else text


def write(path: Path, text: str, mode: int) -> bool:
    """Write a file atomically where its text or mode differs; return whether it did."""
    try:
        if path.read_text() == text and path.stat().st_mode & 0o777 == mode:
            return False
    except OSError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with open(fresh, "w", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(text)
    os.chmod(fresh, mode)
    os.replace(fresh, path)
    return True


def _lines(path: Path) -> List[str]:
    """A file's lines, none where it cannot be read: a link into nowhere, say."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


class _UnixTransport(xmlrpc.client.Transport):
    """XML-RPC over a unix socket."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("localhost", timeout=20)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(20)
        connection.sock.connect(self.path)
        return connection


class Supervisord:
    """supervisord in the state directory, started by us, listening on a socket of ours only."""

    #: 10: its process runs for less than ``startsecs``
    _STATES = {
        0: "stopped", 10: "running", 20: "running", 30: "dead", 40: "stopping", 100: "dead", 200: "dead", 1000: "dead",
    }  # fmt: skip

    def __init__(self, state_dir: str, install_dir: str, ratio: str):
        self.home, self.install = Path(state_dir), Path(install_dir)
        self.socket = render.socket_path(state_dir)
        self._rpc = xmlrpc.client.ServerProxy("http://localhost", transport=_UnixTransport(self.socket))

    def files(self, units: Sequence[Mapping[str, Any]]) -> Dict[Path, Tuple[str, int]]:
        """Return the files of the units: path -> (text, mode)."""
        home = str(self.home)
        result = {self.home / "supervisord.conf": (render.supervisor_conf(home, self.socket), 0o600)}
        for unit in units:
            name = unit["name"]
            result[self.home / "conf.d" / f"{name}.conf"] = (render.supervisor_program(unit, home), 0o600)
            result[self.home / "units" / f"{name}.sh"] = (render.run_script(unit, home), 0o700)
        return result

    def _call(self, name: str, *args: Any) -> Any:
        return getattr(self._rpc.supervisor, name)(*args)

    def _up(self) -> bool:
        try:
            self._call("getState")
            return True
        except (OSError, http.client.HTTPException):
            return False

    def status(self) -> Dict[str, Status]:
        """Return every unit's status ({} while supervisord is not there)."""
        if not self._up():
            return {}
        return {
            row["name"]: Status(self._STATES[row["state"]], row["pid"], row["spawnerr"] or row["description"] or "started")
            for row in self._call("getAllProcessInfo")
        }

    def reload(self) -> None:
        """Make the manager know the files as they are; running units stay as they are."""
        for folder in ("log", "conf.d", "units", "run/supervisord"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        if not self._up():
            program = self.install / "supervisor" / "bin" / "supervisord"
            Path(self.socket).unlink(missing_ok=True)
            started = subprocess.run(
                [str(program), "-c", str(self.home / "supervisord.conf")], cwd="/", capture_output=True, text=True,
                check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            end = time.monotonic() + 10
            while not self._up():
                if started.returncode or time.monotonic() > end:
                    raise UserError(f"supervisord does not start: {started.stderr.strip() or started.stdout.strip()}")
                time.sleep(0.05)
        added, changed, removed = self._call("reloadConfig")[0]
        for name in [*changed, *removed]:
            if self._call("getProcessInfo", name)["state"] in (0, 100, 200, 1000):
                self._call("removeProcessGroup", name)
        known = {row["name"] for row in self._call("getAllProcessInfo")}
        for name in [*added, *changed]:
            if name not in known:
                self._call("addProcessGroup", name)

    def start(self, names: Sequence[str]) -> None:
        """Start units; do not wait."""
        for name in names:
            try:
                self._call("startProcess", name, False)
            except xmlrpc.client.Fault as fault:
                if "ALREADY_STARTED" not in fault.faultString:
                    raise
                # It died and waits for its next try, with what it was before: begin anew.
                self._call("stopProcess", name, True)
                self._call("startProcess", name, False)

    def stop(self, names: Sequence[str]) -> None:
        """Stop units; do not wait."""
        for name in names:
            try:
                self._call("stopProcess", name, False)
            except xmlrpc.client.Fault as fault:
                if "NOT_RUNNING" not in fault.faultString:
                    raise

    def log_tail(self, name: str, lines: int = 25) -> str:
        """Return the end of a unit's log."""
        return tail(self.home / "log" / f"{name}.log", lines)

    def log_matching(self, name: str, pattern: str, most: int, follow: int) -> str:
        """Return the first lines that match in what the unit said since it was last started, and those after each."""
        try:
            with (self.home / "log" / f"{name}.log").open(errors="replace") as file:
                return matching(file, pattern, most, follow)
        except OSError:
            return ""

    def shutdown(self) -> None:
        """End the manager itself."""
        if self._up():
            self._call("shutdown")
            end = time.monotonic() + 20
            while processes.ours(str(self.home), "supervisord") and time.monotonic() < end:
                time.sleep(0.05)
        Path(self.socket).unlink(missing_ok=True)


class Systemd:
    """systemd units under /etc/systemd/system, bound together by pd.target."""

    UNITS = Path("/etc/systemd/system")
    _STATES = {
        "active": "running", "reloading": "running", "activating": "starting", "deactivating": "stopping", "failed": "dead",
    }  # fmt: skip

    def __init__(self, state_dir: str, install_dir: str, ratio: str):
        self.home, self.ratio = Path(state_dir), ratio

    def files(self, units: Sequence[Mapping[str, Any]]) -> Dict[Path, Tuple[str, int]]:
        """Return the files of the units: path -> (text, mode)."""
        result = {self.UNITS / "pd.target": (render.systemd_target(), 0o644)}
        for unit in units:
            name = unit["name"]
            result[self.UNITS / f"{name}.service"] = (render.systemd_unit(unit, str(self.home), self.ratio), 0o644)
            # systemd reads it before it gives up root's rights.
            result[self.home / "units" / f"{name}.env"] = (render.systemd_env(unit), 0o600)
        return result

    def own_units(self) -> List[Path]:
        """Return the unit files of this state directory; others' units may well be called pd-something."""
        home = str(self.home).replace("%", "%%")
        paths = sorted(self.UNITS.glob("pd-*.service"))
        return [path for path in paths if f"EnvironmentFile={home}/units/{path.stem}.env" in _lines(path)]

    def refuse_others(self, names: Iterable[str]) -> None:
        """Raise UserError for units whose names are taken by files that are not of this state directory."""
        own = self.own_units()
        taken = [path for path in (self.UNITS / f"{name}.service" for name in names) if path.exists() and path not in own]
        if not taken:
            return
        found = re.search(r"^EnvironmentFile=(.*)/units/pd-", taken[0].read_text(errors="replace"), re.MULTILINE)
        owner = found.group(1).replace("%%", "%") if found else ""
        whose = f"belongs to the deployment with state_dir={owner}" if found else "was not written by deploy_pd.yml"
        away = f"tear that deployment down first (teardown.yml -e state_dir={owner})" if found else "remove the file first"
        raise UserError(
            f"{listing(str(path) for path in taken)} {whose}; nothing was changed here. Units of both cannot run on one host: "
            f"use another host, or {away}"
        )

    @staticmethod
    def _systemctl(*args: str) -> str:
        done = subprocess.run(["systemctl", *args], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"systemctl {' '.join(args)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def check(self, files: Mapping[Path, Tuple[str, int]]) -> None:
        """Refuse units that systemd would not take, or would take in part (it ignores what it does not know, and goes on)."""
        units = {path.name: text for path, (text, _) in files.items() if path.suffix in (".service", ".target")}
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in units]
            for path in paths:
                path.write_text(units[path.name])
            try:
                done = subprocess.run(
                    ["systemd-analyze", "verify", "--man=no", *map(str, paths)], capture_output=True, text=True, check=False
                )
            except FileNotFoundError:
                raise UserError("there is no systemd-analyze, which checks units: install the package systemd") from None
            # It verifies what the units refer to as well: the faults of others are theirs.
            said = [line.replace(f"{folder}/", "") for line in done.stderr.splitlines() if line.strip()]
            wrong = [line for line in said if any(name in line for name in units)]
            if done.returncode and not wrong:
                wrong = said or [f"systemd-analyze verify ended with {done.returncode}"]
        if wrong:
            raise UserError("systemd refuses units that were to be installed; nothing was:\n" + "\n".join(wrong))

    def status(self) -> Dict[str, Status]:
        """Return the status of every unit of ours that has a file."""
        names = [path.name for path in self.own_units()]
        if not names:
            return {}
        result: Dict[str, Status] = {}
        shown = self._systemctl("show", "-p", "Id,ActiveState,SubState,MainPID,Result", *names)
        for block in shown.strip().split("\n\n"):
            row = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            state = "dead" if row["SubState"] == "auto-restart" else self._STATES.get(row["ActiveState"], "stopped")
            detail = f"{row['SubState']}, result {row['Result']}"
            result[row["Id"][: -len(".service")]] = Status(state, int(row["MainPID"]), detail)
        return result

    def reload(self) -> None:
        """Make systemd read the unit files; running units stay as they are."""
        names = [path.name for path in self.own_units()]
        if names:
            # It reads the files anew, too.
            self._systemctl("enable", "--quiet", "pd.target", *names)
        else:
            self._systemctl("daemon-reload")

    def start(self, names: Sequence[str]) -> None:
        """Start units; do not wait."""
        if not names:
            return
        # A deploy that was cut short may have written files that systemd has not read yet.
        self.reload()
        self._systemctl("reset-failed", *(f"{name}.service" for name in names))
        self._systemctl("start", "--no-block", "pd.target", *(f"{name}.service" for name in names))

    def stop(self, names: Sequence[str]) -> None:
        """Stop units; do not wait."""
        if not names:
            return
        self._systemctl("stop", "--no-block", *(f"{name}.service" for name in names))

    def remove(self, names: Sequence[str]) -> None:
        """Remove stopped units, and what systemd remembers of them."""
        units = [f"{name}.service" for name in names]
        for unit in units:
            (self.UNITS / "pd.target.wants" / unit).unlink(missing_ok=True)
            (self.UNITS / unit).unlink(missing_ok=True)
        self._systemctl("daemon-reload")
        # A server that was asked to end and gave a code of its own stays listed as failed; most are not, which is no fault.
        subprocess.run(["systemctl", "reset-failed", *units], capture_output=True, check=False)

    def log_tail(self, name: str, lines: int = 25) -> str:
        """Return the end of a unit's journal."""
        command = ["journalctl", "-u", f"{name}.service", "-n", str(lines), "--no-pager", "-o", "cat", "-q"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    def log_matching(self, name: str, pattern: str, most: int, follow: int) -> str:
        """Return the first lines that match in what the unit said since it was last started, and those after each."""
        shown = self._systemctl("show", "-p", "InvocationID", "--value", f"{name}.service").strip()
        command = ["journalctl", f"_SYSTEMD_INVOCATION_ID={shown}", "--no-pager", "-o", "cat", "-q"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as journal:
            assert journal.stdout is not None
            return matching(journal.stdout, pattern, most, follow)

    def shutdown(self) -> None:
        """Forget the target, unless another deployment on this host still has units."""
        wants = self.UNITS / "pd.target.wants"
        if (self.UNITS / "pd.target").exists() and not list(wants.glob("*")):
            self._systemctl("stop", "pd.target")
            self._systemctl("disable", "--quiet", "pd.target")
            (self.UNITS / "pd.target").unlink()
            if wants.exists():
                wants.rmdir()
            self._systemctl("daemon-reload")


Manager = Union[Supervisord, Systemd]
MANAGERS: Dict[str, Union[Type[Supervisord], Type[Systemd]]] = {"supervisord": Supervisord, "systemd": Systemd}
