"""The lab's network: a bridge in a namespace of its own, one cable a host, cuts, rates and delays.

The machine's own network is never touched, and nothing in the lab can reach out.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lab.common import (
    BRIDGE,
    CONTROLLER,
    HOSTS,
    NET,
    SWITCH,
    LabError,
    address,
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

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
NFT = """table bridge lab {
  set cut { type ipv4_addr . ipv4_addr; }
  chain forward { type filter hook forward priority 0; ip saddr . ip daddr @cut drop; }
  chain input   { type filter hook input priority 0;   ip saddr . ip daddr @cut drop; }
  chain output  { type filter hook output priority 0;  ip saddr . ip daddr @cut drop; }
}
"""


def exists(name: str) -> bool:
    """Whether a network namespace is there."""
    return (Path("/run/netns") / name).exists()


def enter(name: str) -> None:
    """Move this thread into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")


def inside(name: str, call: Callable[[], T]) -> T:
    """Call with this thread in a network namespace; sockets made there stay there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as here:
        enter(name)
        try:
            return call()
        finally:
            libc.setns(here.fileno(), CLONE_NEWNET)


def make_switch() -> None:
    """Make the bridge, with the controller's end of it."""
    if exists(SWITCH):
        return
    ip("netns", "add", SWITCH)
    ip("link", "set", "lo", "up", ns=SWITCH)
    ip("link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "forward_delay", "0", ns=SWITCH)
    ip("addr", "add", f"{CONTROLLER}/24", "dev", BRIDGE, ns=SWITCH)
    ip("link", "set", BRIDGE, "up", ns=SWITCH)
    run("ip", "netns", "exec", SWITCH, "nft", "-f", "-", input=NFT)


def plug(host: str) -> None:
    """Give a host its namespace and its cable."""
    ns = namespace(host)
    if exists(ns):
        return
    ip("netns", "add", ns)
    ip("link", "add", port(host), "type", "veth", "peer", "name", "eth0", "netns", ns, ns=SWITCH)
    ip("link", "set", port(host), "master", BRIDGE, ns=SWITCH)
    ip("link", "set", "lo", "up", ns=ns)
    ip("addr", "add", f"{address(host)}/24", "dev", "eth0", ns=ns)
    ip("link", "set", "eth0", "up", ns=ns)
    ip("route", "add", "default", "via", CONTROLLER, ns=ns)  # as on a real host; it leads nowhere


def remove() -> None:
    """Remove every namespace of the lab."""
    for name in [*map(namespace, known()), SWITCH]:
        if exists(name):
            ip("netns", "del", name)


def wait_ssh(hosts: list[str], timeout_s: float = 60) -> None:
    """Wait until the controller gets an SSH banner from every host; all are asked at once."""
    end, left = time.monotonic() + timeout_s, set(hosts)

    def ask() -> dict[socket.socket, str]:
        asked = {}
        for host in left:
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex((address(host), 22))
            asked[sock] = host
        return asked

    while left:
        if time.monotonic() > end:
            raise LabError(f"no sshd after {timeout_s:.0f} s: {' '.join(sorted(left))}")
        asked, until = inside(SWITCH, ask), time.monotonic() + 0.4
        while asked and time.monotonic() < until:
            for sock in select.select(list(asked), [], [], 0.05)[0]:
                host = asked.pop(sock)
                with sock:
                    try:
                        if sock.recv(4) == b"SSH-":
                            left.discard(host)
                    except OSError:
                        continue
        for sock in asked:
            sock.close()
        for host in left:
            if not supervisor(host):
                raise LabError(f"{host} did not boot; see {HOSTS / host}/console.log")
        time.sleep(0.05 if left else 0)


def hand_over(host: str, port_text: str) -> None:
    """Serve ssh's ProxyUseFdpass: connect from the switch, and hand the socket over on stdout."""
    where = host if host.startswith(NET) else address(host)
    try:
        sock = inside(SWITCH, lambda: socket.create_connection((where, int(port_text)), 5))
    except OSError as error:
        raise LabError(f"connect to {host} port {port_text}: {error.strerror or error}") from None
    socket.send_fds(socket.socket(fileno=os.dup(1)), [b"\0"], [sock.fileno()])


# -- faults


def unplugged(host: str) -> Path:
    """Return the file that is there while the host's cable is out."""
    return HOSTS / host / "unplugged"


def unplug(host: str) -> None:
    """Pull a host's cable; it stays out over a reboot."""
    unplugged(host).touch()
    ip("link", "set", port(host), "down", ns=SWITCH)


def partition(one: str, other: str) -> None:
    """Drop every packet between two hosts, or a host and the controller."""
    a, b = address(one), address(other)
    _cuts("add", "element", "bridge", "lab", "cut", f"{{ {a} . {b}, {b} . {a} }}")


def heal() -> None:
    """Undo every cut, and put every cable back in."""
    _cuts("flush", "set", "bridge", "lab", "cut")
    back = [host for host in known() if unplugged(host).exists()]
    for host in back:
        unplugged(host).unlink()
        if supervisor(host):
            ip("link", "set", port(host), "up", ns=SWITCH)
    wait_ssh([host for host in back if leader(host)])


def _cuts(*words: str) -> None:
    run("ip", "netns", "exec", SWITCH, "nft", *words)


def unshape(host: str) -> None:
    """Take a host's rate and delay away."""
    state = load(host)
    relay = state.get("relay")
    if relay and start_time(relay) == state.get("relay_started"):
        os.kill(relay, signal.SIGTERM)
    for ns, device in ((SWITCH, port(host)), (namespace(host), "eth0")):
        run("tc", "-n", ns, "qdisc", "del", "dev", device, "root", check=False)
    ip("link", "set", port(host), "master", BRIDGE, ns=SWITCH, check=False)
    ip("link", "del", f"t{port(host)}", ns=SWITCH, check=False)
    save(host, relay=None)


def shape(host: str, rate: str, delay_ms: float) -> None:
    """Limit a host's cable in both directions: ``rate`` as tc takes it (``50mbit``), ``delay_ms`` each way.

    The rate is tc's tbf. Kernels for virtual machines often lack netem, so that a delay is made by a relay process
    (lab.relay) that takes the port's place on the bridge.
    """
    unshape(host)
    if rate:
        for ns, device in ((SWITCH, port(host)), (namespace(host), "eth0")):
            how = ("tbf", "rate", rate, "burst", "64kb", "latency", "200ms")
            run("tc", "-n", ns, "qdisc", "replace", "dev", device, "root", *how)
    if delay_ms:
        with open(HOSTS / host / "relay.log", "w") as errors:
            process = subprocess.Popen(
                itself("_relay", host, str(delay_ms)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
        assert process.stdout
        if process.stdout.readline() != b"ready\n":
            raise LabError(f"the relay failed; see {HOSTS / host}/relay.log")
        save(host, relay=process.pid, relay_started=start_time(process.pid))
