"""What the machine lets one client hold open: checked before anything is sent."""

from __future__ import annotations

import resource
from pathlib import Path

from pdbench.load.errors import LoadError

#: descriptors of a sending process that are no connection
_OTHERS = 64
_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def make_room(concurrency: int, processes: int) -> None:
    """Raise this process's soft limit of open files, which senders inherit, as far as the hard one goes.

    Raise LoadError, saying what is to be raised, when ``concurrency`` connections over ``processes`` cannot be held.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    each = -(-concurrency // processes) + _OTHERS
    if hard != resource.RLIM_INFINITY and each > hard:
        enough = -(-concurrency // max(1, hard - _OTHERS))
        raise LoadError(
            f"{concurrency} requests in flight need {each} open files in each sending process, and the hard limit is {hard}: "
            f"raise it (ulimit -Hn, or LimitNOFILE= of the service), or share them out: --processes {enough}"
        )
    if soft != resource.RLIM_INFINITY and each > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (each if hard == resource.RLIM_INFINITY else hard, hard))
    ports = local_ports()
    if ports is not None and concurrency > ports:
        raise LoadError(
            f"{concurrency} requests in flight need as many local ports, and this machine has {ports}: "
            f"widen them (sysctl net.ipv4.ip_local_port_range), or load from several machines"
        )


def local_ports() -> int | None:
    """Return how many ports a connection may come from; None where the system does not say."""
    try:
        low, high = map(int, _PORTS.read_text().split())
    except (OSError, ValueError):
        return None
    return high - low + 1
