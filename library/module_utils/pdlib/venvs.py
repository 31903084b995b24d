"""Virtualenvs on a host: made in the background from requirement files, so that the caller can show progress."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence

from .errors import UserError, listing
from .folders import claim, use
from .managers import tail
from .processes import alive, work_dir
from .steps import STEP_S, Outcome
from .wheelhouse import unpack

Json = Dict[str, Any]


class Venv:
    """One virtualenv: ``name``, and ``requirements`` installed in turn (``no-deps:FILE``; ``pdbench`` is our own wheel).

    ``files``: base64 contents of every file that the requirements name; ``wheels``: the folder that has all wheels, for
    hosts that reach no registry. ``source`` in the row: NIXL is built on the host (transfer.py), with the tools of another
    virtualenv that is made at the same time.
    """

    def __init__(
        self,
        install_dir: str,
        state_dir: str,
        python: str,
        row: Mapping[str, Any],
        files: Mapping[str, str],
        wheels: Optional[Path] = None,
    ):
        self.wheels = wheels
        self.folder = Path(install_dir) / row["name"]
        self.work = Path(install_dir) / f"{row['name']}.install"
        self.state_dir, self.python, self.name = state_dir, python or sys.executable, row["name"]
        self.steps: List[str] = list(row["requirements"])
        self.source: Optional[Mapping[str, str]] = row.get("source")
        self.contents = {step: base64.b64decode(files[step.replace("no-deps:", "", 1)]) for step in self.steps}

    def stamp(self) -> str:
        """Return a hash of all that the virtualenv is made from."""
        digest = hashlib.sha256(self.python.encode())
        for step in self.steps:
            digest.update(step.encode() + b"\0" + hashlib.sha256(self.contents[step]).digest())
        digest.update(json.dumps(self.source, sort_keys=True).encode() if self.source else b"")
        return digest.hexdigest()

    def ready(self) -> bool:
        """Whether the virtualenv is there as wanted."""
        try:
            return bool((self.folder / ".pd-stamp").read_text() == self.stamp())
        except OSError:
            return False

    def running(self) -> bool:
        """Whether an installer is at work on it."""
        try:
            pid = int((self.work / "pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_text()
            # For a moment after its start a process has no command line yet; nor has a zombie.
            return self.work.name in command or (not command and alive(pid))
        except (OSError, ValueError):
            return False

    def start(self) -> None:
        """Start the installer in the background; it writes the stamp last."""
        self.work.mkdir(parents=True, exist_ok=True)
        target, work = shlex.quote(str(self.folder)), str(self.work)
        old = shlex.quote(f"{self.folder}.old")
        # What runs from the old one may still import from it, and gets it back when the new one does not come to be.
        back = shlex.quote(f"[ ! -e {old} ] || {{ rm -rf {target}; mv {old} {target}; }}")
        # An old one that is there already was left by an installer that was killed: it is the whole one of the two.
        aside = f"if [ -e {old} ]; then rm -rf {target}; elif [ -e {target} ]; then mv {target} {old}; fi"
        # Services that are not root's read it, whatever umask sudo has.
        lines = ["#!/bin/sh", "set -e", "umask 022", aside, f"trap {back} EXIT"]
        lines.append(f"{shlex.quote(self.python)} -m venv {target}")
        for step in self.steps:
            name = step.replace("no-deps:", "", 1)
            path = self.work / ("pdbench-0.1.0-py3-none-any.whl" if name == "pdbench" else Path(name).name)
            path.write_bytes(self.contents[step])
            what = shlex.quote(str(path)) if path.suffix == ".whl" else f"-r {shlex.quote(str(path))}"
            deps = "--no-deps " if step.startswith("no-deps:") or path.suffix == ".whl" else ""
            source = f"--no-index --only-binary=:all: --find-links {shlex.quote(str(self.wheels))} " if self.wheels else ""
            lines.append(f"{target}/bin/python -m pip install --no-input --disable-pip-version-check {source}{deps}{what}")
        lines += self._build() if self.source else []
        lines.append(f"printf %s {self.stamp()} > {target}/.pd-stamp")
        lines.append(f"rm -rf {old}")
        script = self.work / "install.sh"
        script.write_text("\n".join(lines) + "\n")
        marked = work_dir(self.state_dir, f"install-{self.name}")
        Path(marked).mkdir(parents=True, exist_ok=True)
        with open(f"{work}/log", "wb") as log:
            process = subprocess.Popen(
                ["/bin/sh", str(script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=marked,
            )
        (self.work / "pid").write_text(str(process.pid))
        (self.work / "started").write_text(str(time.time()))

    def _build(self) -> List[str]:
        """Shell that builds NIXL from a copy of its sources, and puts it into the virtualenv.

        Without build isolation, in which pip would fetch a torch of gigabytes that only NIXL's expert parallelism needs. The
        distribution gets the name that the shim ``nixl`` looks for; the module's own follows the CUDA compiler.
        """
        assert self.source is not None
        source, tools = self.source, self.folder.parent / self.source["tools"]
        bin_, copy, wheels = (shlex.quote(str(path)) for path in (tools / "bin", self.work / "nixl", self.work / "nixl-wheel"))
        stamp, pid = shlex.quote(f"{tools}/.pd-stamp"), shlex.quote(f"{tools}.install/pid")
        gone = f'[ -d "/proc/$(cat {pid})" ] || {{ echo "{tools.name} is not there to build NIXL with"; exit 1; }}'
        setting = shlex.quote(f"--config-settings=setup-args=-Ducx_path={source['ucx']}")
        pip = "pip --no-input --disable-pip-version-check"
        return [
            f"until [ -e {stamp} ]; do {gone}; sleep 1; done",
            f"[ -e {shlex.quote(source['path'] + '/pyproject.toml')} ] || {{ echo 'nixl_source={source['path']}: no pyproject.toml'; exit 1; }}",
            f"[ -e {shlex.quote(source['ucx'] + '/include/ucp/api/ucp.h')} ] || {{ echo 'ucx_prefix={source['ucx']}: no include/ucp'; exit 1; }}",
            f"rm -rf {copy} {wheels}",
            f"cp -r {shlex.quote(source['path'])} {copy}",
            f"sed -i 's/^name *= *.nixl[a-z0-9-]*.$/name = \"{source['name']}\"/' {copy}/pyproject.toml",
            f"PATH={bin_}:$PATH {bin_}/python -m {pip} wheel --no-deps --no-build-isolation -w {wheels} {setting} {copy}",
            f"{shlex.quote(str(self.folder))}/bin/python -m {pip} install --no-deps --force-reinstall {wheels}/*.whl",
            f"rm -rf {copy} {wheels}",
        ]

    def describe(self) -> str:
        """Return one line of progress."""
        try:
            age = f"{time.time() - float((self.work / 'started').read_text()):.0f} s"
        except (OSError, ValueError):
            age = "new"
        said = [line for line in tail(self.work / "log", 20).splitlines() if not line.startswith("WARNING")]
        last = said[-1].strip().partition(" (from ")[0][:60] if said else ""
        return f"{self.name} ({age}): {last}" if last else f"{self.name} ({age})"


@contextmanager
def _locked(install_dir: str) -> Iterator[None]:
    """Two inventory hosts may share an install_dir: only one of them starts an installer."""
    with open(Path(install_dir) / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def step(
    install_dir: str,
    state_dir: str,
    python: str,
    rows: Sequence[Json],
    files: Mapping[str, str],
    check: bool,
    resumed: bool,
    wheelhouses: Optional[Mapping[str, str]] = None,
    archives: Optional[Mapping[str, str]] = None,
    shared: bool = False,
) -> Outcome:
    """Bring all virtualenvs of ``rows`` a few seconds closer to being there.

    ``wheelhouses``: virtualenv -> the wheelhouse that it is installed from (others: from the registry); those that the host
    lacks come back in the outcome's ``lacks``, and are then given in ``archives`` (wheelhouse -> tar file on the host).
    ``shared``: the services run as another user.
    """
    if shared:
        # sudo may have a stricter one, and then the services could not reach what is made here.
        os.umask(0o022)
    outcome = Outcome()
    houses = {name: Path(install_dir) / "wheelhouse" / house for name, house in (wheelhouses or {}).items()}
    venvs = [Venv(install_dir, state_dir, python, row, files, houses.get(row["name"])) for row in rows]
    if check:
        outcome.changed = [f"would install {venv.name}" for venv in venvs if not venv.ready()]
        outcome.done = True
        return outcome
    if claim(install_dir, shared) | claim(state_dir, shared):
        outcome.changed.append("made install_dir and state_dir")
    use(install_dir, state_dir)
    with _locked(install_dir):
        for house, source in (archives or {}).items():
            if not (Path(install_dir) / "wheelhouse" / house).exists():
                unpack(Path(source), Path(install_dir) / "wheelhouse" / house)
                outcome.changed.append(f"got wheels of {house.rpartition('-')[0]}")
    outcome.lacks = [v.wheels.name for v in venvs if v.wheels and not v.wheels.exists() and not v.ready()]
    if outcome.lacks:
        return outcome
    end = time.monotonic() + STEP_S
    with _locked(install_dir):
        # In this order: an installer that ends between the two questions is there, and did not fail.
        missing = [venv for venv in venvs if not venv.running() and not venv.ready()]
        failed = [venv for venv in missing if resumed and (venv.work / "pid").exists()]
        if failed:
            for venv in failed:
                (venv.work / "pid").unlink()
            log = tail(failed[0].work / "log", 20)
            raise UserError(f"{listing(v.name for v in failed)} did not install. The end of {failed[0].work}/log:\n{log}")
        for venv in missing:
            venv.start()
            outcome.changed.append(f"installed {venv.name}")
    waiting = venvs
    while waiting and time.monotonic() < end:
        waiting = [venv for venv in waiting if not venv.ready() and venv.running()]
        if waiting:
            time.sleep(0.2)
    unfinished = [venv for venv in venvs if not venv.ready()]
    outcome.done = not unfinished
    outcome.message = "installing " + "; ".join(venv.describe() for venv in unfinished)
    return outcome
