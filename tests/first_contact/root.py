"""A bare root filesystem of Debian or Ubuntu, and commands in it: nothing of this machine is there but its network."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.base import sources as own_sources
from lab.common import REPO, children, run

#: A file with the other distribution's apt sources, for a machine of one of them.
ASKED = "PD_FIRST_CONTACT_{}_SOURCES"
#: Ubuntu's keys as its own mirrors have them, and what is in it: the keyring of Debian 13's signed ubuntu-keyring, byte for byte
KEYS = "pool/main/u/ubuntu-keyring/ubuntu-keyring_2023.11.28.1_all.deb"
KEYRING_SHA256 = "80a36b0a6de2f69f49d2df75ef473ccde121e9e190b9ea01d20a4f63778d5c31"
#: no Signed-By: in the root it is Ubuntu's own keyring that apt trusts, which has another path than ours
UBUNTU = "Types: deb\nURIs: {uri}\nSuites: noble noble-updates noble-security\nComponents: main universe\n"
#: A process namespace: what a command leaves behind is in it, and ends with it.
ENTER = """
root=$1; shift
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for path; do
    if [ -d "$path" ]; then mkdir -p "$root$path"; else mkdir -p "$root${path%/*}"; [ -e "$root$path" ] || : >"$root$path"; fi
    mount --bind -o ro "$path" "$root$path"
done
exec chroot "$root" /bin/sh -c 'sleep infinity & wait'
"""


@dataclass(frozen=True)
class Sources:
    """A distribution's apt sources: files for apt, the suite that they name, and its keys where apt here has none of them."""

    files: tuple[Path, ...]
    suite: str
    keyring: Path | None = None


@functools.cache
def sources(distribution: str) -> Sources | None:
    """Return the apt sources of a distribution, None where this machine knows of none."""
    asked = os.environ.get(ASKED.format(distribution.upper()))
    files = [Path(asked)] if asked else [path for path in own_sources() if distribution in path.read_text()]
    text = "\n".join(path.read_text() for path in files)
    suite = re.search(r"^Suites:\s*(\S+)|^deb\s+(?:\[[^]]*\]\s+)?\S+\s+(\S+)", text, re.M)
    if suite:
        return Sources(tuple(files), suite[1] or suite[2])
    return _ubuntu_beside_debian() if distribution == "ubuntu" else None


def _ubuntu_beside_debian() -> Sources | None:
    """Return the sources of Ubuntu on this machine's own mirror of Debian: many mirrors have both, side by side."""
    uris = re.findall(r"https?://\S+/debian(?=/?\s)", "\n".join(path.read_text() for path in own_sources()))
    for uri in {uri.removesuffix("debian") + "ubuntu" for uri in uris}:
        try:
            with urllib.request.urlopen(f"{uri}/{KEYS}", timeout=20) as answer:
                package = answer.read()
        except OSError:
            continue
        folder = REPO / ".pd" / "first-contact-ubuntu"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "keys.deb").write_bytes(package)
        (folder / "ubuntu.sources").write_text(UBUNTU.format(uri=uri))
        run("dpkg-deb", "-x", folder / "keys.deb", folder)
        keyring = folder / "usr/share/keyrings/ubuntu-archive-keyring.gpg"
        assert hashlib.sha256(keyring.read_bytes()).hexdigest() == KEYRING_SHA256, f"{uri}/{KEYS} holds other keys than Debian's"
        return Sources((folder / "ubuntu.sources",), "noble", keyring)
    return None


def make(folder: Path, found: Sources) -> Path:
    """Make the bare root: what `apt` itself needs, and no more."""
    root = folder / "root"
    run(
        *("mmdebstrap", "--variant=minbase", "--format=directory", "--dpkgopt=force-unsafe-io"),
        *('--aptopt=Acquire::Languages "none"', '--aptopt=Acquire::Check-Valid-Until "false"'),
        # Ubuntu's smallest set leaves out what every image of Ubuntu has.
        *([f"--keyring={found.keyring}", "--include=apt,ubuntu-keyring"] if found.keyring else []),
        found.suite,
        root,
        *found.files,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    for name in ("resolv.conf", "hosts"):
        (root / "etc" / name).unlink(missing_ok=True)
        shutil.copy(Path("/etc") / name, root / "etc" / name)
    return root


def pip_settings() -> tuple[str, list[Path]]:
    """Return this machine's settings of pip as one pip.conf, whoever set them, and the files and folders that they name."""
    told = re.findall(
        r"^(global|install|:env:)\.([\w-]+)='(.*)'$", run(sys.executable, "-m", "pip", "config", "list").stdout, re.M
    )
    # the environment wins over files
    rows = {name: value for _, name, value in sorted(told, key=lambda row: row[0] == ":env:")}
    words = re.split(r"\s+|\\n", " ".join(rows.values()))
    named = {Path(word.removeprefix("file://")) for word in words if word.removeprefix("file://").startswith("/")}
    # an index in a folder has its files beside it
    paths = {path.parent if path.name == "simple" else path for path in named}
    lines = [f"{name} = {value}" for name, value in rows.items() if name != "config-file"]
    return "\n".join(["[global]", *lines, ""]).replace("\\n", " "), sorted(path for path in paths if path.exists())


class Inside:
    """The root, entered: commands of root and of a user, in a process namespace that ends with the block."""

    def __init__(self, root: Path, first: int):
        self.root, self._first = root, first

    def command(self, words: list[str]) -> list[str]:
        """Return the command line that runs a command in there, as root and with an empty environment."""
        clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "DEBIAN_FRONTEND=noninteractive"]
        return ["nsenter", "-t", str(self._first), "-m", "-p", "-r", "-w", *clean, *words]

    def script(self, lines: str, user: str = "root", timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        """Run lines of bash, as a login of the user."""
        file = self.root / "tmp" / "typed.sh"
        file.write_text(lines)
        words = ["su", "-l", user, "-c", "bash /tmp/typed.sh"] if user != "root" else ["bash", "/tmp/typed.sh"]
        return subprocess.run(
            self.command(words), text=True, check=False, timeout=timeout_s, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def processes(self) -> list[str]:
        """Return the command of every process but the first and what keeps it waiting."""
        space, found = os.readlink(f"/proc/{self._first}/ns/pid"), []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(path / "ns/pid") != space or int(path.name) in (self._first, *children(self._first)[:1]):
                    continue
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip())
            except OSError:
                continue
        return [command for command in found if command]  # a zombie has none


@contextmanager
def inside(root: Path, shared: list[Path]) -> Iterator[Inside]:
    """Enter the root, with ``shared`` of this machine at the same paths, read-only."""
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    process = subprocess.Popen([*command, "sh", "-euc", ENTER, "sh", str(root), *map(str, shared)], stdin=subprocess.DEVNULL)
    try:
        first = 0
        while process.poll() is None and not first:
            # it is there once it has become the root's own shell, which has a child
            first = next((kid for kid in children(process.pid) if _ready(kid, root)), 0)
        assert first, f"{' '.join(command)}: exit code {process.poll()}"
        yield Inside(root, first)
    finally:
        process.kill()
        process.wait()


def _ready(pid: int, root: Path) -> bool:
    try:
        return os.path.samefile(f"/proc/{pid}/root", root) and bool(children(pid))
    except OSError:
        return False
