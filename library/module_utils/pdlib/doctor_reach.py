"""Can hosts reach each other's ports? All hosts run this at the same time: each listens, and each connects to the others.

A port that the deployment listens on is connected to as it is (``direct``). For one that is still free, the host that it belongs to
opens a listener for as long as its peers need: a connection that is refused would say nothing without. Peers introduce
themselves, so that a listener ends when all have come and not by a timer.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

from . import firewall
from .doctor_facts import Json
from .firewall import MOONCAKE_PORTS

#: Seconds for one try to connect: a packet that was lost is sent again after one and after three.
_TRY_S = 3.0
_HELLO = b"pd-doctor "
#: The same for those who should not come through, and how many of them try each port.
_STRANGER_TRY_S, _STRANGERS = 1.5, 4


# -- which ways there are (on the controller)


def ways(
    plan: Mapping[str, Any],
    clients: Sequence[str] = (),
    ranges: Optional[Mapping[str, Sequence[int]]] = None,
    meet: Optional[Mapping[str, Any]] = None,
) -> List[Json]:
    """Return the ways that a deployment needs: {from, to, address, port, what}, hosts by name; within a host there are none.

    ``clients``: the bench clients, of which the first asks workers for their metrics; ``meet``: the ``address`` and ``port`` at
    which the others come to it. ``ranges``: host -> (first, last) of the ports that its kernel gives out, of which ZMQ takes any.
    """
    workers = {worker["name"]: worker for worker in plan.get("workers", [])}
    found: Dict[Tuple[str, str, int], Json] = {}

    def way(source: str, rank: Mapping[str, Any], port: Optional[int], what: str) -> None:
        if port and source != rank["host"]:
            key = (source, rank["address"], port)
            found.setdefault(key, {"from": source, "to": rank["host"], "address": rank["address"], "port": port, "what": what})

    for pair in plan.get("pairs", []):
        prefill, decode = workers[pair["prefill"]], workers[pair["decode"]]
        first = prefill["ranks"][0]
        for rank in decode["ranks"]:
            way(rank["host"], first, first.get("bootstrap_port"), f"bootstrap of {prefill['name']}")
            way(rank["host"], first, first.get("side_channel_port"), f"KV side channel of {prefill['name']}")
        way(
            first["host"], decode["ranks"][0], decode["ranks"][0].get("side_channel_port"), f"KV side channel of {decode['name']}"
        )
        for one, other in ((one, other) for p in prefill["ranks"] for d in decode["ranks"] for one, other in ((p, d), (d, p))):
            for port, what in _random_ports(other["host"], plan.get("transfer_backend", ""), ranges or {}):
                way(one["host"], other, port, what)
    for worker in workers.values():
        head = worker["ranks"][0]
        way(plan["router"]["host"], head, head["port"], f"HTTP of {worker['name']}")
        for rank in worker["ranks"][1:]:
            way(rank["host"], head, head.get("dist_init_port"), f"rendezvous of {worker['name']}")
    for place, client in enumerate(clients if plan else ()):
        way(client, plan["router"], plan["router"]["port"], "the router")
        for worker in workers.values() if place == 0 else ():
            way(client, worker["ranks"][0], worker["ranks"][0]["port"], f"HTTP of {worker['name']} (metrics)")
        if meet:
            way(client, {"host": clients[0], "address": meet["address"]}, meet["port"], "where bench clients meet")
    return list(found.values())


def _random_ports(host: str, backend: str, ranges: Mapping[str, Sequence[int]]) -> Iterable[Tuple[int, str]]:
    """Two of the ports of which each transfer takes any: an open port beside a closed range would say nothing."""
    if host in ranges:
        first, last = ranges[host]
        for part in (0.21, 0.83):
            yield int(first + (last - first) * part), f"one of ZMQ's random ports, {first}-{last}"
    if backend.startswith("mooncake"):
        first, last = MOONCAKE_PORTS
        yield first + 1207, f"one of Mooncake's ports, {first}-{last}"


def strangers(plan: Mapping[str, Any], clients: Sequence[str], addresses: Mapping[str, Sequence[str]]) -> List[Json]:
    """Return ways as :func:`ways` does, of hosts to ports at which they have no business, each with ``stranger``.

    ``addresses``: of every host that was examined, its own. Each port is tried by four of them at most; the router's by none while
    it has no firewall, for that is where clients come.
    """
    found: List[Json] = []
    hosts, every = list(addresses), list(firewall.ports(plan, clients))
    for port in every:
        walled = firewall.wanted(plan, port.host)
        if port.last > port.first or port.host not in addresses or (port.open_to == "clients" and not walled):
            continue
        let_in, start = firewall.admitted(plan, port), hosts.index(port.host) + 1
        # A port within a range that engines take theirs from is open to who has business there.
        welcome = {
            source for row in every if row.host == port.host and row.first <= port.first <= row.last for source in row.sources
        }
        others = [host for host in [*hosts[start:], *hosts[:start]] if host != port.host and host not in welcome]
        outside = [host for host in others if not any(firewall.inside(own, let_in) for own in addresses[host])]
        row = {"to": port.host, "address": port.address, "port": port.first, "what": port.what, "stranger": True}
        found += [{"from": host, **row} for host in outside[:_STRANGERS]]
    return found


def jobs(every: Sequence[Json], listening: Mapping[str, Sequence[Sequence[Any]]]) -> Dict[str, Json]:
    """Return host -> {connect, listen}: what each host does. ``listening``: (address, port) pairs that are in use on each host.

    Hosts that are not in ``listening`` were not examined: they do nothing, and what they would listen on is left out.
    """
    found: Dict[str, Json] = {host: {"name": host, "connect": [], "listen": {}} for host in listening}
    for row in every:
        if row["from"] not in found:
            continue
        taken = row["to"] in found and any(
            port == row["port"] and address in (row["address"], "0.0.0.0", "::") for address, port in listening[row["to"]]
        )
        if not taken and (row["to"] not in found or row.get("stranger")):
            continue
        found[row["from"]]["connect"].append({**row, "direct": taken})
        if not taken:
            key = f"{row['address']} {row['port']}"
            found[row["to"]]["listen"].setdefault(key, []).append(row["from"])
    return found


# -- on a host


class _Listener:
    """Listens on one port until every expected peer has introduced itself."""

    def __init__(self, address: str, port: int, expected: Iterable[str]):
        self.missing: Set[str] = set(expected)
        self.done = threading.Event()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.sock.bind((address, port))
            self.sock.listen(64)
        except OSError:
            self.sock.close()
            raise
        self.sock.settimeout(0.2)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while not self.done.is_set():
            try:
                peer, _ = self.sock.accept()
            except socket.timeout:
                continue
            except OSError:
                return
            with peer:
                peer.settimeout(1.0)
                try:
                    said = peer.recv(256)
                except OSError:
                    continue
            if said.startswith(_HELLO):
                self.missing.discard(said[len(_HELLO) :].decode(errors="replace").strip())
                if not self.missing:
                    self.done.set()

    def close(self) -> None:
        self.done.set()
        self.sock.close()


def _connect(name: str, row: Json, end: float) -> Json:
    """Try one way until it works or time is over; a listener that is not there yet may come."""
    tries_left = 1 if row.get("stranger") else 2 if row["direct"] else 10**6
    patience = _STRANGER_TRY_S if row.get("stranger") else _TRY_S
    state, why = "dropped", ""
    while True:
        try:
            with socket.create_connection((row["address"], row["port"]), timeout=patience) as sock:
                if not row["direct"]:
                    sock.sendall(_HELLO + name.encode() + b"\n")
                return {**row, "state": "open", "why": ""}
        except socket.timeout:
            state, why = "dropped", f"no answer within {patience:.0f} s (packets are dropped on the way, as firewalls do)"
        except OSError as error:
            state, why = _refusal(error)
        tries_left -= 1
        if not tries_left or time.monotonic() > end:
            return {**row, "state": state, "why": why}
        time.sleep(0.2)


def _refusal(error: OSError) -> Tuple[str, str]:
    if error.errno == errno.ECONNREFUSED:
        return "refused", "refused, though something listens there (a firewall that rejects)"
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM):
        return "unreachable", f"{error.strerror} (no route, or a firewall that rejects)"
    return "failed", error.strerror or str(error)


def reach(job: Mapping[str, Any], window_s: float) -> List[Json]:
    """Do a host's part; return its ``connect`` rows, each with ``state`` (open, refused, dropped, unreachable, failed) and ``why``.

    A listener that cannot be opened is in the answer as a row of its own with ``state`` "no listener". Ends as soon as all is
    done here and all peers have come, and after ``window_s`` seconds (plus one try) at the latest.
    """
    end = time.monotonic() + window_s
    rows: List[Json] = []
    listeners: List[_Listener] = []
    try:
        for key, expected in job["listen"].items():
            address, _, port = key.rpartition(" ")
            try:
                listeners.append(_Listener(address, int(port), expected))
            except OSError as error:
                why = f"{job['name']} cannot listen there: {error.strerror}"
                rows.append({"to": job["name"], "address": address, "port": int(port), "state": "no listener", "why": why})
        if job["connect"]:
            with ThreadPoolExecutor(max_workers=min(64, len(job["connect"]))) as pool:
                rows += list(pool.map(lambda row: _connect(job["name"], row, end), job["connect"]))
        for listener in listeners:
            listener.done.wait(max(0.0, end - time.monotonic()))
    finally:
        for listener in listeners:
            listener.close()
    return rows


def heard(rows: Mapping[str, Sequence[Json]], spans: Optional[Mapping[str, Tuple[float, float]]] = None) -> Dict[str, List[Json]]:
    """Return host -> its connections, those without a listener at the other end marked as "unheard".

    ``rows``: what :func:`reach` returned on each host; one that gave no answer has none. ``spans``: host -> (first, last) second
    at which it was certainly at it, by one clock: two hosts of which one came when the other was gone did not meet.
    """
    silent = {
        (row["address"], row["port"]): row["why"] for listed in rows.values() for row in listed if row["state"] == "no listener"
    }
    result: Dict[str, List[Json]] = {}
    for host, listed in rows.items():
        result[host] = []
        for row in listed:
            if row["state"] == "no listener":
                continue
            why = silent.get((row["address"], row["port"]))
            if why is None and not row["direct"] and row["state"] == "refused":
                if row["to"] not in rows:
                    why = f"{row['to']} was not there to listen"
                elif not _met(spans or {}, host, row["to"]):
                    why = f"{row['to']} and {host} were examined one after the other: fewer hosts with -l, or more forks (-f)"
            missing = why is not None and row["state"] != "open"
            result[host].append({**row, "state": "unheard", "why": why} if missing else row)
    return result


def _met(spans: Mapping[str, Tuple[float, float]], one: str, other: str) -> bool:
    """Whether two hosts were certainly at it at the same time; also where nothing is known of the times."""
    if one not in spans or other not in spans:
        return True
    return max(spans[one][0], spans[other][0]) < min(spans[one][1], spans[other][1])
