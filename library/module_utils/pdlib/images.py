"""The engine of a host that is not in a virtualenv of ours: an image that is pulled or loaded, or an environment that is there."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from . import accounts, processes, transfer
from .containers import call, last_line, note
from .errors import UserError
from .folders import claim, use
from .managers import tail, write
from .steps import STEP_S, Outcome

Json = Dict[str, Any]
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
#: Run by the Python that has the engine: its version, from its metadata or from the source checkout that it imports.
_VERSION = r"""
import importlib.metadata as m, importlib.util, pathlib, re, sys
name = sys.argv[1]
spec = importlib.util.find_spec(name)
if spec is None:
    sys.exit("no module")
version = ""
for dist in (name, name + "-cpu"):
    try:
        version = m.version(dist)
        break
    except m.PackageNotFoundError:
        pass
for file in ("version.py", "_version.py"):
    for folder in spec.submodule_search_locations or []:
        path = pathlib.Path(folder) / file
        found = re.search(r"^_*version_* *(?:: *str)? *= *.*?[\"']([^\"']+)[\"']", path.read_text(), re.M) if path.exists() else None
        version = version or (found[1] if found else "")
print(version or "unknown")
print(*{d.metadata["Name"] or "" for d in m.distributions()})
"""


def same_release(found: str, wanted: str) -> bool:
    """Whether a version is the wanted release, or a build of it (``0.5.23+cu130``, ``0.5.23.post1``, a checkout's ``.dev7``)."""
    return bool(re.fullmatch(re.escape(wanted) + r"(?:\.post\d+|\.dev\d+)?(?:\+.*)?", found))


def check_existing(home: Mapping[str, Any], user: str) -> str:
    """Refuse a Python that is not there, cannot be run by the services' user, or has not the engine in the wanted version.

    Refuse two builds of Mooncake, too: they are files of one name, and which of them are there is chance. Return a warning for
    two builds of NIXL ("" for none): its shim takes the one that fits torch.
    """
    python, engine, wanted = home["python"], home["package"], home["version"]
    if not Path(python).exists():
        raise UserError(f"engine_python={python}: there is no such Python on the host (runtime: existing)")
    run_as = user if user and accounts.exists(user) else None
    env = {**os.environ, **home["env"]}
    try:
        done = subprocess.run(
            [python, "-c", _VERSION, engine], capture_output=True, text=True, check=False, cwd="/", env=env, timeout=120,
            stdin=subprocess.DEVNULL, user=run_as, group=accounts.group_of(run_as) if run_as else None,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        who = f" as {run_as}" if run_as else ""
        raise UserError(f"engine_python={python} does not run{who}: {error}") from None
    found, _, names = done.stdout.strip().partition("\n")
    if done.returncode or not found:
        if "no module" in done.stderr:
            raise UserError(
                f"engine_python={python} has no {engine}: name the Python of the environment that has it; "
                "for a source checkout that is not installed, put its folder into engine_env: {PYTHONPATH: ...}"
            )
        raise UserError(f"engine_python={python} does not say which {engine} it has: {last_line(done.stderr)}")
    if not same_release(found, wanted):
        raise UserError(
            f"engine_python={python} has {engine} {found}, and engine_version is {wanted}: set engine_version to what is there, "
            "or name another Python"
        )
    several = transfer.doubled(names.split())
    if "mooncake" in several:
        raise UserError(transfer.doubled_message(python, several))
    return transfer.doubled_message(python, several)


class Image:
    """An engine's image on this host. ``archive``: its size and sha256 where it comes from a file on the controller."""

    def __init__(self, home: Mapping[str, Any], state_dir: str, archive: Optional[Mapping[str, Any]]):
        self.client, self.ref, self.archive = home["kind"], home["image"], archive
        self.state_dir, self.record, self.min_free = state_dir, Path(home["record"]), home["min_free_gb"]
        self.work = Path(processes.work_dir(state_dir, "image"))

    def check_client(self, gpus: bool) -> str:
        """Refuse a host whose client cannot be used by us; return where it keeps images."""
        asked = "{{.DockerRootDir}}" if self.client == "docker" else "{{.Store.GraphRoot}}"
        done = call(self.client, "info", "--format", asked)
        if done.returncode:
            who = "the one who connects" if os.geteuid() else "root"
            hint = (
                "add that user to the group docker, or become root"
                if "permission denied" in done.stderr.lower()
                else "is it running?"
            )
            raise UserError(f"{who} cannot use {self.client} on the host ({hint}): {last_line(done.stderr)}")
        if gpus and self.client == "docker" and not any(map(shutil.which, ("nvidia-container-runtime-hook", "nvidia-ctk"))):
            raise UserError("docker cannot give GPUs to containers on this host: install the package nvidia-container-toolkit")
        if gpus and self.client == "podman" and not _cdi_gpus():
            raise UserError(
                "podman knows no GPU on this host: install nvidia-container-toolkit, and as root run "
                "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
            )
        return done.stdout.strip()

    def found(self) -> Optional[Json]:
        """Return the image's id and architecture, None when it is not there (or is another one than was loaded)."""
        done = call(self.client, "image", "inspect", "--format", "{{.Id}} {{.Architecture}}", self.ref)
        if done.returncode:
            return None
        image_id, _, machine = done.stdout.strip().partition(" ")
        return {"id": image_id.replace("sha256:", ""), "machine": _MACHINES.get(machine, machine)}

    def ready(self) -> bool:
        """Whether the image is there as wanted; raise UserError for one of another architecture."""
        image = self.found()
        if image is None:
            return False
        if image["machine"] != platform.machine():
            raise UserError(
                f"engine_image={self.ref} is made for {image['machine']}, and the host is {platform.machine()}: "
                "set engine_image in the host_vars of each kind of host"
            )
        if self.archive is None:
            return True
        try:
            record = json.loads(self.record.read_text())
        except (OSError, ValueError):
            return False
        return bool(record == {"archive": self.archive["sha256"], "id": image["id"]})

    def check_room(self, root: str) -> None:
        """Refuse to fetch an image where the disk is too full for it."""
        free = shutil.disk_usage(root).free / 1e9
        if free < self.min_free:
            raise UserError(
                f"{self.client} keeps images in {root}, where {free:.1f} GB are free, and engine_image_min_free_gb is "
                f"{self.min_free:g}: nothing was fetched"
            )

    def start(self, archive_path: str) -> None:
        """Start to pull or load in the background."""
        self.work.mkdir(parents=True, exist_ok=True)
        command = [self.client, "load", "--input", archive_path] if archive_path else [self.client, "pull", self.ref]
        with open(self.work / "log", "wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=self.work
            )
        write(self.work / "job.json", json.dumps({"ref": self.ref, "pid": process.pid, "began": time.time()}), 0o600)

    def job(self) -> Optional[Json]:
        """Return what is being fetched, None for nothing; ``running`` says whether it goes on."""
        try:
            job: Json = json.loads((self.work / "job.json").read_text())
        except (OSError, ValueError):
            return None
        running = processes.alive(job["pid"]) and any(p.pid == job["pid"] for p in processes.ours(self.state_dir, "image"))
        return {**job, "running": running} if job["ref"] == self.ref else None

    def describe(self, job: Mapping[str, Any]) -> str:
        """Return one line of progress."""
        said = [line for line in tail(self.work / "log", 400).splitlines() if line.strip()]
        layers = sum("Pulling fs layer" in line for line in said)
        done = sum("Pull complete" in line for line in said)
        how = f"{done} of {layers} layers" if layers else (said[-1].strip()[:80] if said else "")
        return f"{'loading' if self.archive else 'pulling'} {self.ref} ({time.time() - job['began']:.0f} s) {how}".rstrip()

    def settle(self) -> None:
        """Take stock after the client has ended: the image is there, or it says why not."""
        (self.work / "job.json").unlink(missing_ok=True)
        said = tail(self.work / "log", 12)
        image = self.found()
        if image is None and self.archive and "Loaded image" in said:
            raise UserError(f"engine_image={self.ref} is not in the archive: {last_line(said)}. Set engine_image to that name")
        if image is None:
            raise UserError(f"{self.client} did not {'load' if self.archive else 'pull'} {self.ref}. It said:\n{said}")
        if self.archive:
            self.record.parent.mkdir(parents=True, exist_ok=True)
            write(self.record, json.dumps({"archive": self.archive["sha256"], "id": image["id"]}), 0o644)


def _cdi_gpus() -> bool:
    """Whether a CDI file describes NVIDIA GPUs."""
    files = [
        path for folder in ("/etc/cdi", "/var/run/cdi") for path in Path(folder).glob("*") if path.suffix in (".yaml", ".json")
    ]
    return any("nvidia.com/gpu" in path.read_text(errors="replace") for path in files)


def step(
    home: Mapping[str, Any],
    state_dir: str,
    install_dir: str,
    user: str,
    archive: Optional[Mapping[str, Any]],
    archive_path: str,
    check: bool,
    resumed: bool,
) -> Outcome:
    """Bring the engine of ``home`` (the plan's ``runtime`` of a host) a few seconds closer to being there.

    An archive that has to be loaded comes back in the outcome's ``lacks``, and is then given as ``archive_path``.
    """
    outcome = Outcome(done=True)
    if home["kind"] == "existing":
        outcome.message = check_existing(home, user)
        return outcome
    image = Image(home, state_dir, archive)
    root = "" if resumed else image.check_client(home["gpus"])
    job = image.job()
    if not job and image.ready():
        return outcome
    verb = "load" if archive else "pull"
    if check:
        outcome.changed.append(f"would {verb} {image.ref}")
        return outcome
    if not job:
        if root:
            image.check_room(root)
        if archive and not archive_path:
            outcome.done, outcome.lacks = False, [image.ref]
            return outcome
        claim(install_dir, shared=bool(user))
        claim(state_dir, shared=bool(user))
        use(install_dir, state_dir)
        note(state_dir, [image.client])
        image.start(archive_path)
    end = time.monotonic() + STEP_S
    while True:
        job = image.job()
        if not job or not job["running"]:
            break
        if time.monotonic() > end:
            outcome.done, outcome.message = False, image.describe(job)
            return outcome
        time.sleep(0.2)
    image.settle()
    image.ready()
    outcome.changed.append(f"{verb}ed {image.ref}")
    return outcome
