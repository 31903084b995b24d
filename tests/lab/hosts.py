"""Hosts: systemd-nspawn containers with systemd as PID 1, an sshd, a journal and an address of their own."""

from __future__ import annotations

import json
import os
import secrets
import select
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from lab import cgroups, network
from lab.base import USER, base
from lab.common import (
    CONTROLLER,
    HOSTS,
    KEY,
    LAB,
    PREFIX,
    STATE,
    SWITCH,
    LabError,
    address,
    children,
    ip,
    itself,
    known,
    leader,
    load,
    namespace,
    port,
    run,
    save,
    start_time,
    supervisor,
)  # fmt: skip

#: Runs nspawn ("$@") for as long as the host reboots (its exit code 133); there is carrier only while it is on.
SUPERVISOR = """
switch=$1 port=$2 unplugged=$3; shift 3
while :; do
    [ -e "$unplugged" ] || ip -n "$switch" link set "$port" up
    "$@"; code=$?
    ip -n "$switch" link set "$port" down
    [ $code = 133 ] || exit $code
done
"""
#: Limits of the machine as a whole, by what they must be for a number of hosts: each systemd takes about 8 inotify instances, and
#: every host knows the hardware address of every other (without room, connections die in silence from 30 hosts on).
LIMITS: dict[str, Callable[[int], int]] = {
    "fs/inotify/max_user_instances": lambda hosts: 64 + 32 * hosts,
    "net/ipv4/neigh/default/gc_thresh2": lambda hosts: 512 + 2 * hosts * hosts,
    "net/ipv4/neigh/default/gc_thresh3": lambda hosts: 1024 + 2 * hosts * hosts,
    "net/ipv6/neigh/default/gc_thresh2": lambda hosts: 512 + 2 * hosts * hosts,
    "net/ipv6/neigh/default/gc_thresh3": lambda hosts: 1024 + 2 * hosts * hosts,
}
SYSCTL = Path("/proc/sys")


def up(count: int, shared: Mapping[str, Path] | None = None) -> None:
    """Make and boot h1 to h``count``, and wait for their sshd; those that are on are left alone.

    ``shared``: folders of this machine that new hosts see, read-only, by their path in the host.
    """
    names = [f"h{number}" for number in range(1, count + 1)]
    root = base()
    HOSTS.mkdir(parents=True, exist_ok=True)
    if not KEY.exists():
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", LAB, "-f", KEY)
    network.make_switch()
    for host in names:
        if not load(host):
            _create(host, root, shared or {})
    _raise_limits(len(known()))
    _write_files()
    for host in names:
        if not supervisor(host):
            _boot(host)
    for host in known():  # hosts that were on already learn the new names
        if supervisor(host):
            (HOSTS / host / "root/etc/hosts").write_text((STATE / "hosts.txt").read_text())
    network.wait_ssh([host for host in names if not network.unplugged(host).exists()])


def _create(host: str, root: Path, shared: Mapping[str, Path]) -> None:
    """Make a host's disk: its keys, name and machine id over the shared base."""
    folder = HOSTS / host
    upper = folder / "upper"
    for name in ("work", "root", "upper/etc/ssh", f"upper/home/{USER}/.ssh"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (upper / "etc/hostname").write_text(f"{host}\n")
    (upper / "etc/machine-id").write_text(f"{secrets.token_hex(16)}\n")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", host, "-f", upper / "etc/ssh/ssh_host_ed25519_key")
    home = upper / "home" / USER
    shutil.copy(f"{KEY}.pub", home / ".ssh/authorized_keys")
    accounts = (line.split(":") for line in (root / "etc/passwd").read_text().splitlines())
    user_id = next(int(row[2]) for row in accounts if row[0] == USER)
    for path in [home, *home.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)
        os.chown(path, user_id, user_id)
    (folder / "state.json").write_text(json.dumps({"base": str(root), "shared": {path: str(shared[path]) for path in shared}}))


def _write_files() -> None:
    """Write what knows all hosts: names, known_hosts with their real keys, and ssh's configuration."""
    names = known()
    rows = [("127.0.0.1", "localhost"), (CONTROLLER, "controller"), *((address(host), host) for host in names)]
    (STATE / "hosts.txt").write_text("".join(f"{where} {name}\n" for where, name in rows))
    keys = {host: (HOSTS / host / "upper/etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2] for host in names}
    (STATE / "known_hosts").write_text("".join(f"{host},{address(host)} {' '.join(keys[host])}\n" for host in names))
    text = "".join(f"Host {host} {address(host)}\n  HostName {address(host)}\n" for host in names)
    text += (
        f'Host *\n  User {USER}\n  IdentityFile "{KEY}"\n  IdentitiesOnly yes\n  UserKnownHostsFile "{STATE}/known_hosts"\n'
        "  StrictHostKeyChecking yes\n  ConnectTimeout 5\n  ServerAliveInterval 5\n  ServerAliveCountMax 3\n"
    )
    (STATE / "ssh_config").write_text(text)
    # From outside the switch: the socket is opened there and handed to ssh, so that no packet for the lab leaves by the
    # machine's own network.
    (STATE / "ssh_config.outside").write_text(
        f"{text}  ProxyCommand {shlex.join(itself('_fd', '%h', '%p'))}\n  ProxyUseFdpass yes\n"
    )


def _boot(host: str) -> None:
    folder, state = HOSTS / host, load(host)
    root = folder / "root"
    if not os.path.ismount(root):
        layers = f"lowerdir={state['base']},upperdir={folder}/upper,workdir={folder}/work,xino=off"
        run("mount", "-t", "overlay", "-o", layers, PREFIX, root)
    shutil.copy(STATE / "hosts.txt", root / "etc/hosts")
    network.plug(host)
    save(host, cgroups=None)
    groups = cgroups.folders(host)
    for group in groups.values():
        group.mkdir(parents=True, exist_ok=True)

    def enter() -> None:
        # Not nspawn's --network-namespace-path: its /sys/class/net would show the machine's devices.
        network.enter(namespace(host))
        for group in groups.values():
            (group / "cgroup.procs").write_text("0")

    nspawn = [
        *("systemd-nspawn", "--quiet", f"--directory={root}", f"--machine={PREFIX}-{host}", f"--hostname={host}"),
        *("--register=no", "--keep-unit", "--link-journal=no", "--resolv-conf=off", "--timezone=off"),
        *("--capability=CAP_NET_ADMIN,CAP_IPC_LOCK", "--console=read-only", "--kill-signal=SIGRTMIN+3"),
        *(f"--bind-ro={source}:{path}" for path, source in state["shared"].items()),
        "/sbin/lab-init",
    ]
    script = ["sh", "-c", SUPERVISOR, f"{PREFIX}-{host}", SWITCH, port(host), str(network.unplugged(host))]
    with open(folder / "console.log", "a") as console:
        process = subprocess.Popen(
            [*script, *nspawn], stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
            env={name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}, preexec_fn=enter,
        )  # fmt: skip
    paths = {name: str(group) for name, group in groups.items()}
    save(host, pid=process.pid, started=start_time(process.pid), cgroups=paths)


def _raise_limits(hosts: int) -> None:
    """Make room for so many hosts; what was there is noted, and comes back with `down`."""
    noted = STATE / "limits.json"
    had = json.loads(noted.read_text()) if noted.exists() else {}
    for name, wanted in LIMITS.items():
        path = SYSCTL / name
        if path.exists() and int(path.read_text()) < wanted(hosts):
            had.setdefault(name, path.read_text().strip())
            noted.write_text(json.dumps(had))
            path.write_text(str(wanted(hosts)))


def _end(pids: list[int], how: int, timeout_s: float) -> bool:
    """Signal processes (0: only wait), and wait for their end; return whether all are gone."""
    waiting = []
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
            signal.pidfd_send_signal(fd, how)
        except ProcessLookupError:
            continue
        waiting.append(fd)
    end = time.monotonic() + timeout_s
    while waiting and time.monotonic() < end:
        for fd in select.select(waiting, [], [], max(0.0, end - time.monotonic()))[0]:
            waiting.remove(fd)
            os.close(fd)
    for fd in waiting:
        os.close(fd)
    return not waiting


def kill(host: str) -> None:
    """Power loss: the host is gone at once, its disk stays, and ``up`` turns it on again."""
    if network.exists(SWITCH):
        ip("link", "set", port(host), "down", ns=SWITCH, check=False)
    first, above = leader(host), supervisor(host)
    if first:
        os.kill(first, signal.SIGKILL)
    cgroups.freeze(host, False)  # what is frozen dies only once it is thawed
    if above and not _end([above], 0, 10):
        _end([*children(above), above], signal.SIGKILL, 5)
    cgroups.remove(host)


def down() -> None:
    """Turn all hosts off, and remove all but the base root."""
    names = known()
    for host in names:
        cgroups.freeze(host, False)
        if network.exists(SWITCH):
            network.unshape(host)
    for pid in filter(None, map(leader, names)):
        os.kill(pid, signal.SIGRTMIN + 4)  # systemd: power off
    end = time.monotonic() + 15
    while time.monotonic() < end and any(map(supervisor, names)):
        time.sleep(0.1)
    for host in names:
        kill(host)
        if os.path.ismount(HOSTS / host / "root"):
            run("umount", "-l", HOSTS / host / "root")
    network.remove()
    if (STATE / "limits.json").exists():
        for name, value in json.loads((STATE / "limits.json").read_text()).items():
            (SYSCTL / name).write_text(value)
    shutil.rmtree(STATE, ignore_errors=True)


def status() -> list[str]:
    """Return one line a host."""
    lines = []
    for host in known():
        first = leader(host)
        cable = " unplugged" if network.unplugged(host).exists() else ""
        lines.append(f"{host} {address(host)} {f'on, pid {first}' if first else 'off'}{cable}")
    return lines


def on_host(host: str, command: list[str]) -> list[str]:
    """Return the command line that runs ``command`` as root in a host, without SSH: it works while the host is cut off."""
    first = leader(host)
    if not first:
        raise LabError(f"{host} is off")
    clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"]
    return ["nsenter", "-t", str(first), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", *clean, *command]


def on_switch(command: list[str]) -> list[str]:
    """Return the command line that runs ``command`` at the controller's end of the bridge, where the hosts' names resolve."""
    names = 'mount --bind "$0" /etc/hosts && exec "$@"'
    return ["nsenter", f"--net=/run/netns/{SWITCH}", "unshare", "-m", "sh", "-c", names, str(STATE / "hosts.txt"), *command]
