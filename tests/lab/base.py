"""The base root that all hosts share, made from this machine's own apt sources and kept by a hash of its recipe."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

from lab.common import DIR, REPO, LabError, log, run

#: Debian packages that the lab needs on this machine, with the command that shows each is there.
NEEDS = {
    "systemd-container": "systemd-nspawn",
    "mmdebstrap": "mmdebstrap",
    "nftables": "nft",
    "openssh-client": "ssh",
    "iproute2": "ip",
}
PACKAGES = """
    systemd systemd-sysv dbus libpam-systemd openssh-server sudo python3 python3-venv iproute2 iputils-ping procps
    ca-certificates curl kmod libfaketime libibverbs1 libnuma1 nftables
"""
#: Units that have no business in a container.
MASKED = """
    apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service dpkg-db-backup.timer fstrim.timer
    getty.target console-getty.service dev-hugepages.mount systemd-udevd.service systemd-modules-load.service
"""
#: PID 1 of a host is this, which then becomes systemd. nspawn mounts the v1 controllers read-only, but they are the
#: host's own: opened, so that MemoryMax=, CPUQuota= and TasksMax= hold inside.
INIT = """#!/bin/sh
for c in memory cpu cpuacct pids blkio freezer devices; do
    [ -e "/sys/fs/cgroup/$c/tasks" ] && mount -o remount,bind,rw "/sys/fs/cgroup/$c"
done
exec /lib/systemd/systemd "$@"
"""
#: The account that Ansible uses, as on real hosts: an ordinary user who may become root, by the file that docs/security.md has.
USER = "ops"
SUDOERS = (REPO / "docs" / "security.md").read_text().partition("```sudoers\n")[2].partition("```")[0]


def unfit() -> str:
    """Return why the lab cannot run on this machine, "" when it can."""
    if os.geteuid():
        return "the lab needs root"
    missing = [package for package, command in NEEDS.items() if not shutil.which(command)]
    if missing:
        return f"the lab needs Debian packages: {' '.join(missing)} (make lab-deps)"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "the lab needs overlayfs, which this kernel has not"
    if run("unshare", "--mount", "--net", "true", check=False).returncode:
        return "the lab needs namespaces of its own, which this machine refuses"
    return ""


def install_needs() -> None:
    """Install what is missing, with apt-get."""
    missing = [package for package, command in NEEDS.items() if not shutil.which(command)]
    if missing and not os.geteuid() and shutil.which("apt-get"):
        log(f"installing {' '.join(missing)}")
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        run("apt-get", "update", env=env)
        run("apt-get", "install", "-y", "--no-install-recommends", *missing, env=env)


def sources() -> list[Path]:
    """Return the files with this machine's apt sources."""
    etc = Path("/etc/apt")
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    return [path for path in files if path.suffix in (".list", ".sources") and path.exists() and path.read_text().strip()]


def _suite() -> str:
    words = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return words.get("VERSION_CODENAME", "").strip('"')


def base() -> Path:
    """Return the base root, made when it is not there (about 25 s and 220 MB)."""
    files, suite = sources(), _suite()
    if not files or not suite:
        raise LabError("hosts are made from this machine's apt sources, and it has none: use a Debian machine")
    # The number goes up when the steps below change.
    recipe = json.dumps([1, suite, PACKAGES, MASKED, INIT, USER, SUDOERS, [path.read_text() for path in files]])
    folder = DIR / f"base-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    started = time.monotonic()
    DIR.mkdir(parents=True, exist_ok=True)
    new = DIR / f".new-{os.getpid()}"
    log("making the base root (half a minute)")
    without = [f"--dpkgopt=path-exclude=/usr/share/{what}/*" for what in ("man", "locale", "doc")]
    run(
        *("mmdebstrap", "--variant=minbase", "--format=directory", "--include=" + ",".join(PACKAGES.split())),
        *('--aptopt=Acquire::Languages "none"', '--aptopt=Acquire::Check-Valid-Until "false"', "--dpkgopt=force-unsafe-io"),
        *without,
        suite,
        new,
        *files,
        env={**os.environ, "TMPDIR": str(DIR)},
    )
    for key in (new / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    for unit in MASKED.split():
        link = new / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    # A name that /etc/hosts has not is unknown at once, not after a DNS server that is not there.
    names = new / "etc/nsswitch.conf"
    names.write_text(names.read_text().replace("files dns", "files"))
    (new / "sbin/lab-init").write_text(INIT)
    (new / "sbin/lab-init").chmod(0o755)
    run("chroot", new, "useradd", "-m", "-s", "/bin/bash", USER)
    (new / "etc/sudoers.d" / USER).write_text(SUDOERS)
    (new / "etc/sudoers.d" / USER).chmod(0o440)
    run("chroot", new, "visudo", "-cf", f"/etc/sudoers.d/{USER}")
    new.rename(folder)
    log(f"made {folder.name} in {time.monotonic() - started:.0f} s")
    return folder
