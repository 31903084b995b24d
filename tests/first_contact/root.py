"""A bare root filesystem of Debian or Ubuntu, and commands in it: nothing of this machine is there but its network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.base import sources as own_sources
from lab.common import children, run

#: A file with the other distribution's apt sources, for a machine of one of them.
ASKED = "PD_FIRST_CONTACT_{}_SOURCES"
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


def sources(distribution: str) -> tuple[list[Path], str]:
    """Return the apt sources of a distribution and the suite that they name; none where this machine has none."""
    asked = os.environ.get(ASKED.format(distribution.upper()))
    files = [Path(asked)] if asked else [path for path in own_sources() if distribution in path.read_text()]
    text = "\n".join(path.read_text() for path in files)
    suite = re.search(r"^Suites:\s*(\S+)|^deb\s+(?:\[[^]]*\]\s+)?\S+\s+(\S+)", text, re.M)
    return files, (suite[1] or suite[2]) if suite else ""


def make(folder: Path, distribution: str) -> Path:
    """Make the bare root: what `apt` itself needs, and no more."""
    files, suite = sources(distribution)
    root = folder / "root"
    run(
        *("mmdebstrap", "--variant=minbase", "--format=directory", "--dpkgopt=force-unsafe-io"),
        *('--aptopt=Acquire::Languages "none"', '--aptopt=Acquire::Check-Valid-Until "false"'),
        suite,
        root,
        *files,
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
