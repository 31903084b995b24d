"""Wheels for hosts that reach no registry, fetched on the controller for the Python and the machine of the host.

Runs on the controller only (it needs `packaging`, which comes with Ansible).
"""

from __future__ import annotations

import fcntl
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from .errors import UserError, listing

#: A line of progress, for people.
Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """What wheels must fit: the Python's full version, the machine (``x86_64``, ``aarch64``) and glibc's version."""

    version: str
    machine: str
    glibc: str

    @property
    def minor(self) -> str:
        """Python's minor version, such as 3.11."""
        return ".".join(self.version.split(".")[:2])

    def __str__(self) -> str:
        return f"Python {self.minor} on {self.machine} with glibc {self.glibc}"

    def here(self) -> bool:
        """Whether this Python is of the same minor version, on the same kind of machine."""
        return (self.minor, self.machine) == ("%d.%d" % sys.version_info[:2], platform.machine())


def environment(target: Target) -> Dict[str, str]:
    """Return what environment markers (PEP 508) see on the target."""
    return {
        "implementation_name": "cpython",
        "implementation_version": target.version,
        "os_name": "posix",
        "platform_machine": target.machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": target.version,
        "python_version": target.minor,
        "sys_platform": "linux",
    }


def platforms(target: Target) -> List[str]:
    """Return the wheel platforms that the target takes, newest first (PEP 600 and its older names)."""
    if not target.glibc:
        raise UserError("wheelhouse: the host has no glibc, and the wheels of our locks are for glibc (manylinux)")
    major, minor = (int(part) for part in target.glibc.split(".")[:2])
    oldest = 5 if target.machine in ("x86_64", "i686") else 17
    tags = [f"manylinux_{major}_{number}_{target.machine}" for number in range(minor, oldest - 1, -1)]
    old = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    tags += [f"{name}_{target.machine}" for number, name in old.items() if oldest <= number <= minor]
    return [*tags, f"linux_{target.machine}"]


def _logical_lines(text: str) -> Iterator[str]:
    for line in re.sub(r"[ \t]*\\\n[ \t]*", " ", text).splitlines():
        plain = re.sub(r"(^|\s)#.*$", "", line).strip()
        if plain:
            yield plain


def narrowed(text: str, target: Target) -> Tuple[str, bool]:
    """Return the requirements that hold on the target, without their markers, and whether every one has a hash.

    pip evaluates markers for the Python that runs it, whatever ``--platform`` says, so that they must not reach it.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    lines, hashed = [], True
    for line in _logical_lines(text):
        if line.startswith("-"):
            lines.append(line)
            continue
        words, *hashes = re.split(r"\s+(?=--hash[= ])", line)
        try:
            wanted = Requirement(words)
        except InvalidRequirement as error:
            raise UserError(f"{words!r} is no requirement that a wheelhouse can be made from: {error}") from None
        if wanted.marker is not None and not wanted.marker.evaluate(environment(target)):
            continue
        wanted.marker = None
        hashed = hashed and bool(hashes)
        lines.append(" ".join([str(wanted), *hashes]))
    return "".join(f"{line}\n" for line in lines), hashed


def identity(name: str, steps: Sequence[str], contents: Mapping[str, bytes], target: Target) -> str:
    """Return the name of the wheelhouse of one virtualenv: the virtualenv's, and a hash of requirements and target."""
    digest = hashlib.sha256(f"{target.minor} {target.machine} {target.glibc}".encode())
    for step in steps:
        digest.update(step.encode() + b"\0" + hashlib.sha256(contents[step]).digest())
    return f"{name}-{digest.hexdigest()[:12]}"


def archive(
    folder: Path,
    name: str,
    steps: Sequence[str],
    contents: Mapping[str, bytes],
    target: Target,
    say: Say,
    own: Optional[Path] = None,
) -> Path:
    """Return the wheelhouse as a tar file below ``folder``, made where it is not there yet (a second caller waits for it).

    ``steps``: requirement files, installed in turn (``no-deps:FILE``); ``contents``: step -> the file; ``own``: a folder of
    wheels that takes the place of the registry (tools/bundle.py).
    """
    wanted = folder / f"{identity(name, steps, contents, target)}.tar"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{wanted.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if wanted.exists():
            return wanted
        with tempfile.TemporaryDirectory(dir=folder) as work:
            wheels = Path(work) / "wheels"
            for number, step in enumerate(steps):
                download(name, step, contents[step].decode(), target, Path(work) / f"{number}.txt", wheels, say, own)
            made = Path(work) / "wheels.tar"
            with tarfile.open(made, "w") as tar:
                for wheel in sorted(wheels.glob("*.whl")):
                    tar.add(wheel, arcname=wheel.name)
            made.rename(wanted)
    say(f"wheels of {name} for {target}: {wanted.stat().st_size / 1e6:.0f} MB")
    return wanted


def download(
    name: str, step: str, text: str, target: Target, listed: Path, wheels: Path, say: Say, own: Optional[Path] = None
) -> None:
    """Fetch into the folder ``wheels`` what one requirement file (``text``) needs on the target; ``listed`` is written for pip.

    They come from the controller's registry, or from the folder ``own``.
    """
    narrow, hashed = narrowed(text, target)
    alone = hashed or step.startswith("no-deps:")
    if not alone and not target.here():
        raise UserError(
            f"{step} has no hashes, so that what it depends on must be found out, which works only with the host's own Python "
            f"and machine: run this on a controller with {target}, or lock it (make lock)"
        )
    listed.write_text(narrow)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--only-binary=:all:"]
    command += ["--dest", str(wheels), "-r", str(listed), "--python-version", target.minor, "--implementation", "cp"]
    command += [word for tag in platforms(target) for word in ("--platform", tag)]
    command += (["--no-deps"] if alone else []) + (["--require-hashes"] if hashed else [])
    command += ["--no-index", "--find-links", str(own)] if own else []
    total, seen, said = sum(not line.startswith("-") for line in narrow.splitlines()), 0, []
    pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            said.append(line.rstrip())
            found = re.match(r"(?:Collecting|Processing) (\S+)", line)
            if found:
                seen += 1
                about = f"{seen} of {total}" if alone else str(seen)
                say(f"wheels of {name} for {target}: {about}, {found[1].rpartition('/')[2]}")
    if pip.returncode:
        missing = [match[1] for match in (re.search(r"No matching distribution found for (\S+)", line) for line in said) if match]
        if missing:
            source, hint = "the controller's registry", "pin another version, or put a wheel where pip's find-links looks"
            if own:
                source, hint = str(own), "make the bundle for this Python, machine and glibc (docs/hosts.md)"
            raise UserError(
                f"{listing(missing)} ({step.replace('no-deps:', '', 1)}) has no wheel for {target} in {source}, "
                f"and hosts with wheelhouse: true build nothing: {hint}"
            )
        raise UserError(f"wheels of {name} for {target} could not be fetched:\n" + "\n".join(said[-12:]))


def unpack(tar_file: Path, folder: Path) -> None:
    """Unpack a wheelhouse on the host; ``folder`` is there whole or not at all. Older ones of the same virtualenv go."""
    fresh = folder.with_name(f".{folder.name}.part")
    fresh.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar_file) as tar:
        for member in tar:
            source = tar.extractfile(member) if member.isfile() else None
            if source is None or "/" in member.name or not member.name.endswith(".whl"):
                raise UserError(f"{tar_file} holds {member.name}, which is no wheel")
            with open(fresh / member.name, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    fresh.rename(folder)
    name = folder.name.rpartition("-")[0]
    for old in folder.parent.iterdir():
        if old != folder and re.fullmatch(re.escape(name) + r"-[0-9a-f]{12}", old.name):
            for wheel in old.iterdir():
                wheel.unlink()
            old.rmdir()
