"""The firewall's rulesets: by laws over plans, read by nft itself, and with packets between network namespaces."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from unit import plans

from pdlib import doctor_reach, firewall, firewall_host, units
from pdlib.errors import UserError
from pdlib.managers import Systemd

Json = dict[str, Any]
ON = {"firewall": True, "service_manager": "systemd"}
CLIENTS = ("c1", "c2")


def plan(ratio: str = "2p2d", hosts: int = 4, clients: int = 1, current: Json | None = None, **more: Any) -> Json:
    """Every host in both worker groups, the router on the first, the bench clients on hosts of their own."""
    names = {f"n{i}": plans.host(i, 2, address=f"10.77.0.{i}") for i in range(1, hosts + 1)}
    names |= {name: plans.host(50 + i, 0, address=f"10.77.0.{50 + i}") for i, name in enumerate(CLIENTS[:clients])}
    served = [name for name in names if name not in CLIENTS]
    fixed: Json = {"prefill": served, "decode": served[::-1], "router": served[:1], "clients": CLIENTS[:clients]}
    return plans.plan(names, ratio, current=current, **{**fixed, **ON, "engine": "sglang", "model": "org/m", **more})


def lets_in(text: str, source: str, port: int, interface: str = "eth0") -> bool:
    """What a ruleset says to a connection that is opened: its rules one after the other, as the kernel goes through them."""
    if interface == "lo":
        return True
    for family, sources, listed, verdict in re.findall(
        r"^\t\t(?:(ip6?) saddr \{ (.*?) \} )?tcp dport \{ (.*?) \} (accept|counter drop)$", text, re.M
    ):
        spans = [firewall.span_of(item) for item in listed.split(", ")]
        if not any(first <= port <= last for first, last in spans):
            continue
        nets = [ip_network(item) for item in sources.split(", ")] if family else []
        if not nets or any(ip_address(source) in net for net in nets):
            return bool(verdict == "accept")
    return True


def address(made: Json, name: str) -> str:
    return str(made["hosts"].get(name, {}).get("address") or made["firewall"]["bench"][name])


PLANS = st.builds(
    plan,
    ratio=st.sampled_from(["1p1d", "3p1d", "2p2d", "1p3d", "agg", "4agg"]),
    hosts=st.integers(2, 5),
    clients=st.integers(1, 2),
    engine=st.sampled_from(["sglang", "emulated"]),
    transfer_backend=st.sampled_from(["nixl", "mooncake_tcp"]),
    firewall_clients=st.sampled_from([[], ["192.0.2.0/24"]]),
    firewall_monitors=st.sampled_from([[], ["198.51.100.9"]]),
)


@settings(max_examples=40, deadline=None)
@drawn(PLANS)
def test_every_way_of_the_deployment_is_open_and_a_stranger_has_none(made: Json) -> None:
    clients = list(made["firewall"]["bench"])
    meet = {"address": address(made, clients[0]), "port": 8890} if len(clients) > 1 else None
    ranges = dict.fromkeys(made["hosts"], firewall.RANDOM_PORTS) if not made["emulated"] else {}
    texts = {host: firewall.ruleset([made], host) for host in made["hosts"]}
    ways = [way for way in doctor_reach.ways(made, clients, ranges, meet) if way["to"] in texts]
    assert ways
    for way in ways:
        if not made["emulated"] or "Mooncake" not in way["what"]:
            assert lets_in(texts[way["to"]], address(made, way["from"]), way["port"]), way
            assert not lets_in(texts[way["to"]], "203.0.113.7", way["port"]), way
    for host, text in texts.items():
        for unit in units.host_units(made, host):
            for port in unit["ports"]:
                assert not lets_in(text, "203.0.113.7", port), (host, port)
                assert lets_in(text, "203.0.113.7", port, "lo")
        # what is not ours is nobody's business: SSH, a node exporter, a shared file system
        assert all(lets_in(text, source, port) for source in ("203.0.113.7", "10.77.0.1") for port in (22, 111, 2049, 9100))
        # bench clients move no KV cache
        boot = [rank["bootstrap_port"] for w in made["workers"] for rank in w["ranks"] if rank.get("bootstrap_port")]
        strangers = [address(made, name) for name in clients if name not in made["hosts"]]
        here = [p for p in boot if p in [port for unit in units.host_units(made, host) for port in unit["ports"]]]
        assert not any(lets_in(text, source, port) for source in strangers for port in here)


@settings(max_examples=40, deadline=None)
@drawn(PLANS, PLANS)
def test_while_a_deployment_changes_both_plans_are_served_and_then_one(before: Json, target: Json) -> None:
    for host in {*before["hosts"], *target["hosts"]}:
        during, after = firewall.texts(before, target, host)
        assert after == (firewall.ruleset([target], host) if host in target["hosts"] else "")
        for made in (before, target):
            for way in doctor_reach.ways(made, list(made["firewall"]["bench"])):
                # an emulated engine takes no ports at random, whatever doctor.yml tries
                if way["to"] == host and not (made["emulated"] and "Mooncake" in way["what"]):
                    assert lets_in(during, address(made, way["from"]), way["port"]), (way, during)
        # a second deploy has nothing to do
        if host in target["hosts"]:
            assert firewall.texts(target, target, host) == (after, after)


@settings(max_examples=200, deadline=None)
@drawn(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 40))))
def test_merged_spans_are_the_same_ports_in_order_and_apart(rows: list[tuple[int, int]]) -> None:
    spans = [(first, first + more) for first, more in rows]
    merged = firewall.merged(spans)
    assert {port for first, last in merged for port in range(first, last + 1)} == {
        port for first, last in spans for port in range(first, last + 1)
    }
    assert all(one[1] + 1 < other[0] for one, other in itertools.pairwise(merged))


def test_networks_of_the_variables_reach_the_router_or_what_has_metrics_and_nothing_else() -> None:
    made = plan(hosts=2, firewall_clients=["192.0.2.0/24", "fd00::/8"], firewall_monitors=["198.51.100.9"])
    router, worker = firewall.ruleset([made], "n1"), firewall.ruleset([made], "n2")
    assert lets_in(router, "192.0.2.7", 8000)
    assert lets_in(router, "fd00::7", 8000)
    assert not lets_in(router, "2001:db8::7", 8000)
    assert not lets_in(router, "192.0.2.7", 29000)
    assert not lets_in(worker, "192.0.2.7", 30000)
    assert lets_in(router, "198.51.100.9", 29000)
    assert lets_in(worker, "198.51.100.9", 30000)
    assert not lets_in(router, "198.51.100.9", 8000)
    assert not lets_in(worker, "198.51.100.9", 40000)


def test_ports_of_other_programs_may_be_spared() -> None:
    made = plan(hosts=2, firewall_spared_ports=["32803", "50051-50060"])
    text = firewall.ruleset([made], "n2")
    assert [lets_in(text, "203.0.113.7", port) for port in (32802, 32803, 32804, 50050, 50051, 50060, 50061)] == [
        False, True, False, False, True, True, False,
    ]  # fmt: skip
    closed = firewall.closed(text)
    assert all(not lets_in(text, "203.0.113.7", port) for span in closed for port in span)
    assert not any(first <= 50055 <= last for first, last in closed)
    assert firewall.closed("") == []


def test_a_data_parallel_worker_s_side_channels_are_its_own_all_of_them() -> None:
    more: Json = {"engine": "vllm", "router": "vllm-router", "engine_args": {"data-parallel-size": 4}}
    made = plan("1p1d", hosts=2, **more)
    port = made["workers"][0]["ranks"][0]["side_channel_port"]
    text = firewall.ruleset([made], made["workers"][0]["ranks"][0]["host"])
    assert [lets_in(text, "203.0.113.7", port + i) for i in (-1, 0, 3, 4)] == [True, False, False, True]


def test_a_plan_without_it_has_no_trace_of_it() -> None:
    made = plan(firewall=False)
    assert "firewall" not in made
    assert not any("firewall" in entry for entry in made["hosts"].values())
    assert firewall.changes(None, made, {"n1": False}) == {}
    assert not [name for name in units.rendered_files(made, "n1") if "firewall" in name]
    # switched off: what is there goes, before anything else
    assert firewall.changes(plan(), made, {"n1": True, "n2": False}) == {"n1": {"during": "", "after": ""}}


def test_a_host_that_leaves_is_open_to_the_old_workers_until_all_is_done() -> None:
    before, target = plan("4p4d", hosts=4), plan("1p1d", hosts=1)
    found = firewall.changes(before, target, dict.fromkeys(before["hosts"], True))
    assert found["n4"] == {"during": firewall.ruleset([before], "n4"), "after": ""}
    assert lets_in(found["n1"]["during"], "10.77.0.4", 8998)
    assert not lets_in(found["n1"]["after"], "10.77.0.4", 8998)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"address": "n1.cluster"}, "address of n1 is n1.cluster"),
        ({"service_manager": "supervisord"}, "host n1: firewall: true needs root and systemd"),
    ],
)
def test_what_no_firewall_can_be_made_of_is_refused_before_contact(own: Json, said: str) -> None:
    hosts = {"n1": plans.host(1, **{**ON, **own}), "n2": plans.host(2, **ON)}
    with pytest.raises(UserError, match=re.escape(said)):
        plans.plan(hosts, "1p1d")


def test_a_host_without_nft_is_refused_before_any_host_changes() -> None:
    found = {name: {"nft": name == "n1", "port_range": [20000, 30000]} for name in ("n1", "n2")}
    hosts = {name: plans.host(i, 1, **ON) for i, name in enumerate(found, 1)}
    with pytest.raises(UserError, match="host n2: firewall: true needs nft, which it has not: apt-get install nftables"):
        plans.plan(hosts, "1p1d", discovered=found)
    # and the range of its kernel is the one that is closed
    made = plans.plan(hosts, "1p1d", discovered={**found, "n2": found["n1"]}, engine="sglang", model="org/m")
    assert not lets_in(firewall.ruleset([made], "n2"), "203.0.113.7", 20001)
    assert lets_in(firewall.ruleset([made], "n2"), "203.0.113.7", 40000)


@pytest.mark.parametrize(
    ("name", "value"),
    [("firewall_clients", "10.0.0.1/8"), ("firewall_clients", "n1"), ("firewall_spared_ports", "5-1"), ("firewall", "maybe")],
)
def test_wrong_values_are_refused_by_name(name: str, value: str) -> None:
    given: Json = {name: value}
    with pytest.raises(UserError, match=rf"{name}='{value}'"):
        plan(**given)


def test_a_limit_may_not_leave_out_hosts_that_would_have_to_admit_others() -> None:
    def inputs(ratio: str, **more: Any) -> Any:
        hosts = {f"n{i}": plans.host(i, 1, **{"address": f"10.77.0.{i}", **ON}) for i in (1, 2, 3)}
        return plans.inputs(hosts, ratio, prefill=["n1", "n2"], decode=["n3"], router=["n1"], **more)

    current = plans.make_plan(inputs("1p1d"))
    with pytest.raises(UserError, match=r"--limit leaves out n3, whose firewall .*: type -l n1,n2,n3"):
        plans.make_plan(inputs("2p1d", current=current, limit=["n1", "n2"]))
    assert plans.make_plan(inputs("1p1d", current=current, limit=["n1"])) == current


def test_what_sglang_opens_by_itself_is_closed_to_strangers_and_open_to_workers() -> None:
    made = plan("1p1d", hosts=2)
    text = firewall.ruleset([made], "n1")
    # 0.5.23 takes its torch rendezvous from 22000 to 29999, below the kernel's range, on all addresses
    for port in (22000, 25000, 29999):
        assert not lets_in(text, "203.0.113.7", port)
        assert lets_in(text, address(made, "n2"), port)


def test_who_comes_from_the_device_of_kv_transfers_is_let_in() -> None:
    names = {f"n{i}": plans.host(i, 2, address=f"10.77.0.{i}", tcp_device="ib0,ib1") for i in (1, 2)}
    found = {
        "n2": {
            "netdevs": {"10.77.0.2": "eth0", "10.99.0.2": "ib0", "10.98.0.2": "ib1", "fe80::2": "ib0", "172.17.0.1": "docker0"}
        },
        "n1": {"netdevs": {"10.77.0.1": "ib0", "10.98.0.1": "ib1"}},
    }
    fixed: Json = {"prefill": ["n1"], "decode": ["n2"], "router": ["n1"], "engine": "sglang", "model": "org/m", **ON}
    made = plans.plan(names, "1p1d", discovered=found, **fixed)
    text = firewall.ruleset([made], "n1")
    for port in (40000, made["workers"][0]["ranks"][0]["bootstrap_port"]):
        assert [lets_in(text, source, port) for source in ("10.77.0.2", "10.99.0.2", "10.98.0.2")] == [True] * 3
        assert not any(lets_in(text, source, port) for source in ("172.17.0.1", "10.99.0.3"))
    assert made["hosts"]["n1"]["tcp_addresses"] == ["10.98.0.1"]
    # who was not asked is as it was deployed
    again = plans.plan(names, "1p1d", current=made, discovered={"n1": found["n1"]}, **fixed)
    assert firewall.ruleset([again], "n1") == text
    assert "tcp_addresses" not in plan("1p1d")["hosts"]["n1"]


def test_doctor_s_strangers_are_those_whom_the_rules_keep_out() -> None:
    made = plan("1p1d", hosts=2, firewall_clients=["10.77.0.60/32"])
    addresses = {"n1": ["10.77.0.1"], "n2": ["10.77.0.2"], "c1": ["10.77.0.50"], "n9": ["127.0.0.1", "10.77.0.60"]}
    rows = doctor_reach.strangers(made, ["c1"], addresses)
    assert {(row["from"], row["to"], row["port"]) for row in rows} == {
        *(("n9", host, 30000) for host in ("n1", "n2")), *((name, "n1", 8998) for name in ("c1", "n9")),
        # not n2 at 29000, the router's metrics: SGLang takes ports of its own from there, and n2 has a worker
        ("n2", "n1", 8000), ("n9", "n1", 29000),
    }  # fmt: skip
    for row in rows:
        assert not lets_in(firewall.ruleset([made], row["to"]), addresses[row["from"]][-1], row["port"])
    # without one, the router is where anybody comes
    bare = doctor_reach.strangers(plan("1p1d", hosts=2, firewall=False), ["c1"], addresses)
    assert "the router" not in {row["what"] for row in bare}
    # nobody opens a listener for a stranger
    assert doctor_reach.jobs(rows, {name: [] for name in addresses})["n1"]["listen"] == {}


def test_doctor_asks_the_bootstrap_port_only_from_where_it_is_let_in() -> None:
    hosts = {f"n{i}": plans.host(i, 1) for i in (1, 2, 3)}
    groups: Json = {"prefill": ["n1"], "decode": ["n2"], "router": ["n3"], "engine": "sglang", "model": "org/m"}
    made = plans.plan(hosts, "1p1d", **groups, **ON)
    assert [firewall.comes_in(made, name, "n1", 8998) for name in ("n1", "n2", "n3")] == [True, True, False]
    assert firewall.comes_in(made, "n3", "n1", 30000)
    assert firewall.comes_in(plans.plan(hosts, "1p1d", **groups), "n3", "n1", 8998)


# ---------------------------------------------------------------- nft itself


def unfit() -> str:
    if os.geteuid():
        return "loading a ruleset needs root"
    if not shutil.which("nft") or not shutil.which("ip"):
        return "there is no nft, or no ip (iproute2)"
    tried = subprocess.run(["unshare", "--net", "nft", "list", "tables"], capture_output=True, text=True, check=False)
    return f"this machine refuses it: {tried.stderr.strip()}" if tried.returncode else ""


NO_NFT = unfit()
needs_nft = pytest.mark.skipif(bool(NO_NFT), reason=NO_NFT)


@needs_nft
@pytest.mark.parametrize("engine", ["sglang", "emulated"])
def test_nft_takes_the_rulesets_twice_over_and_gives_them_back_alike(engine: str, tmp_path: Path) -> None:
    more: Json = {"firewall_clients": ["192.0.2.0/24", "fd00::/8"], "firewall_spared_ports": ["50051"]}
    before, target = plan("3p1d", engine=engine, **more), plan("1p3d", engine=engine, clients=2, **more)
    for host in target["hosts"]:
        for text in firewall.texts(before, target, host):
            file = tmp_path / "rules.nft"
            file.write_text(text)
            script = f"nft -c -f {file} && nft -f {file} && nft -s list ruleset && nft -f {file} && nft -s list ruleset"
            done = subprocess.run(["unshare", "--net", "sh", "-c", script], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{text}\n{done.stderr}"
            once, twice = done.stdout[: len(done.stdout) // 2], done.stdout[len(done.stdout) // 2 :]
            assert once == twice
            assert done.stdout.count("table inet pd {") == 2


SERVE = """
import socket, sys, threading
for port in map(int, sys.argv[1:]):
    server = socket.create_server(("", port), backlog=16)
    def loop(server=server):
        while True:
            peer, _ = server.accept()
            threading.Thread(target=lambda p=peer: [p.sendall(b"x") for _ in iter(lambda: p.recv(1), b"")], daemon=True).start()
    threading.Thread(target=loop, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""
TRY = """
import socket, sys
source, rows = sys.argv[1], [item.split(":") for item in sys.argv[2:]]
for host, port in rows:
    try:
        socket.create_connection((host, int(port)), 1, (source, 0)).close()
        print(port, "open")
    except OSError:
        print(port, "closed")
"""
HOLD = """
import socket, sys
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5, (sys.argv[3], 0))
print("held", flush=True)
for line in sys.stdin:
    sock.sendall(b"x")
    print(sock.recv(1).decode(), flush=True)
"""


class Pair:
    """A host with a firewall and a host beside it, as network namespaces on one cable."""

    def __init__(self, tag: str):
        self.server, self.client = f"pdfw{tag}s", f"pdfw{tag}c"

    def run(self, where: str, *command: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", "netns", "exec", where, *command], capture_output=True, text=True, check=False, **more)

    def start(self, where: str, *command: str) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen(["ip", "netns", "exec", where, sys.executable, "-c", *command], text=True, **pipes)  # type: ignore[call-overload, no-any-return]

    def tried(self, source: str, *ports: int, to: str = "10.77.0.2") -> dict[int, str]:
        where = self.server if source == to or source.startswith("127.") else self.client
        done = self.run(where, sys.executable, "-c", TRY, source, *(f"{to}:{port}" for port in ports))
        return {int(line.split()[0]): line.split()[1] for line in done.stdout.splitlines()}


@contextmanager
def netns() -> Iterator[Pair]:
    pair = Pair(str(os.getpid()))

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in (pair.server, pair.client):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", pair.server, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", pair.client)
        ip("-n", pair.server, "addr", "add", "10.77.0.2/24", "dev", "eth0")
        # a decode host, the router's host, the bench client and a stranger
        for last in (1, 3, 50, 99):
            ip("-n", pair.client, "addr", "add", f"10.77.0.{last}/24", "dev", "eth0")
        for name in (pair.server, pair.client):
            ip("-n", name, "link", "set", "eth0", "up")
        yield pair
    finally:
        for name in (pair.server, pair.client):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@needs_nft
def test_packets_of_peers_come_through_and_those_of_strangers_do_not(tmp_path: Path) -> None:
    names = {f"n{i}": {"address": f"10.77.0.{i}", "gpus": 1, "rdma_fabric": "none", **ON} for i in (1, 2, 3)}
    names["c1"] = {"address": "10.77.0.50", "rdma_fabric": "none", "gpus": 0, **ON}
    groups = {"prefill": ["n2"], "decode": ["n1"], "router": ["n3"], "clients": ["c1"]}
    made = plans.plan(names, "1p1d", engine="sglang", model="org/m", **groups)
    rules = tmp_path / "rules.nft"
    rules.write_text(firewall.ruleset([made], "n2"))
    http, boot, zmq, ssh = 30000, 8998, 40123, 22
    every = (http, boot, zmq, ssh)
    with netns() as pair:
        serving = pair.start(pair.server, SERVE, *map(str, every))
        held = None
        try:
            assert serving.stdout
            assert serving.stdout.readline() == "ready\n"
            assert pair.tried("10.77.0.99", *every) == dict.fromkeys(every, "open")
            held = pair.start(pair.client, HOLD, "10.77.0.2", str(http), "10.77.0.99")
            assert held.stdout
            assert held.stdin
            assert held.stdout.readline() == "held\n"
            assert pair.run(pair.server, "nft", "-f", str(rules)).returncode == 0
            seen = {last: pair.tried(f"10.77.0.{last}", *every) for last in (1, 3, 50, 99)}
            own = pair.tried("10.77.0.2", *every)
            # what was open stays open, also over a second load
            assert pair.run(pair.server, "nft", "-f", str(rules)).returncode == 0
            held.stdin.write("\n")
            held.stdin.flush()
            assert held.stdout.readline() == "x\n"
            assert pair.run(pair.server, "nft", "delete", "table", "inet", "pd").returncode == 0
            assert pair.tried("10.77.0.99", *every) == dict.fromkeys(every, "open")
        finally:
            for process in filter(None, (serving, held)):
                process.kill()
                process.communicate()
    opened = {last: {port for port, state in row.items() if state == "open"} for last, row in seen.items()}
    assert opened == {1: {*every}, 3: {http, ssh}, 50: {http, ssh}, 99: {ssh}}
    assert own == dict.fromkeys(every, "open")


# ---------------------------------------------------------------- on a host, with an nft and a systemctl of our own

NFT = """#!/bin/sh
echo "nft $*" >> {home}/asked
case "$*" in
  "-c -f -") cat > /dev/null; [ ! -e {home}/refuse ] || {{ echo 'Operation not permitted' >&2; exit 1; }} ;;
  "-s list table inet pd") cat {home}/table 2>/dev/null ;;
  "delete table inet pd") rm {home}/table ;;
esac
"""
SYSTEMCTL = """#!/bin/sh
echo "systemctl $*" >> {home}/asked
case "$1" in
  reload-or-restart) cp {home}/state/firewall.nft {home}/table; touch {home}/on ;;
  disable) rm -f {home}/table {home}/on ;;
  show) [ -e {home}/on ] && printf 'ActiveState=active\\nUnitFileState=enabled\\n' ;;
esac
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Systemd, "UNITS", tmp_path / "system")
    monkeypatch.setattr(Systemd, "check", lambda self, files: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for folder in ("system", "bin", "state"):
        (tmp_path / folder).mkdir()
    for name, text in {"nft": NFT, "systemctl": SYSTEMCTL}.items():
        (tmp_path / "bin" / name).write_text(text.format(home=tmp_path))
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


RULES = "table inet pd {\n\t\ttcp dport { 1-2 } counter drop\n}\n"


def changed(host: Path, text: str = RULES, check: bool = False) -> list[str]:
    return firewall_host.apply(str(host / "state"), text, check).changed


def test_it_is_loaded_once_and_again_when_somebody_touched_it(host: Path) -> None:
    assert changed(host, check=True) == ["would load the firewall"]
    assert not list((host / "system").iterdir())
    assert not list((host / "state").iterdir())
    assert changed(host) == ["loaded the firewall"]
    assert firewall_host.owner() == str(host / "state")
    assert (host / "state" / "firewall.nft").read_text() == RULES
    assert changed(host) == changed(host, check=True) == []
    # another plan, a rule that somebody added, a table that somebody flushed, a unit that somebody switched off
    assert changed(host, RULES.replace("1-2", "1-3")) == ["loaded the firewall"]
    (host / "table").write_text("table inet pd {\n accept\n}\n")
    assert changed(host, RULES.replace("1-2", "1-3")) == ["loaded the firewall"]
    (host / "table").unlink()
    assert changed(host, RULES.replace("1-2", "1-3")) == ["loaded the firewall"]
    (host / "on").unlink()
    assert changed(host, RULES.replace("1-2", "1-3")) == ["loaded the firewall"]
    assert changed(host, RULES.replace("1-2", "1-3")) == []


def test_it_goes_whole_and_only_its_own_deployment_takes_it_away(host: Path) -> None:
    changed(host)
    assert firewall_host.remove(str(host / "other"), False) == []
    assert firewall_host.remove(str(host / "state"), True) == ["removed the firewall"]
    assert (host / "table").exists()
    assert firewall_host.remove(str(host / "state"), False) == ["removed the firewall"]
    assert not (host / "table").exists()
    assert not list((host / "system").iterdir())
    assert not list((host / "state").iterdir())
    assert firewall_host.remove(str(host / "state"), False) == []


def test_what_a_deploy_that_was_cut_short_left_goes_too(host: Path) -> None:
    (host / "state" / "firewall.nft").write_text(RULES)
    (host / "table").write_text(RULES)
    assert firewall_host.remove(str(host / "state"), False) == ["removed the firewall"]
    assert not (host / "table").exists()


def test_a_host_that_cannot_have_one_says_why_and_stays_as_it_is(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (host / "refuse").touch()
    with pytest.raises(UserError, match=r"nft refuses the ruleset \(Operation not permitted\): a container"):
        changed(host)
    (host / "refuse").unlink()
    monkeypatch.setattr(shutil, "which", lambda name, path="": None)
    with pytest.raises(UserError, match="needs nft, which this host has not: apt-get install nftables"):
        changed(host)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="needs root on this host"):
        changed(host)
    monkeypatch.undo()
    assert not list((host / "system").iterdir())
    assert not list((host / "state").iterdir())


def test_two_deployments_of_a_host_cannot_both_have_one(host: Path) -> None:
    changed(host)
    with pytest.raises(UserError, match=f"the deployment in {host}/state has a firewall on this host"):
        firewall_host.apply(str(host / "other"), RULES, False)


def test_programs_of_others_that_it_closes_are_named(host: Path) -> None:
    with socket.create_server(("", 0)) as other, socket.create_server(("127.0.0.1", 0)) as own:
        ports = [sock.getsockname()[1] for sock in (other, own)]
        text = RULES.replace("1-2", ", ".join(map(str, sorted(ports))))
        (said,) = firewall_host.apply(str(host / "state"), text, True).closed
        assert said.startswith(f"port {ports[0]}: process {os.getpid()}")
    assert "firewall_spared_ports leaves ports out" in firewall_host.says([said])
    assert firewall_host.says([]) == ""


def test_a_state_directory_with_a_percent_sign_is_known_again(host: Path) -> None:
    (host / "system" / firewall.UNIT).write_text(firewall.unit("/srv/100%"))
    assert firewall_host.owner() == "/srv/100%"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_systemd_takes_its_unit_whole(tmp_path: Path) -> None:
    Systemd("/var/lib/pd", "", "").check({tmp_path / firewall.UNIT: (firewall.unit("/var/lib/pd"), 0o644)})
