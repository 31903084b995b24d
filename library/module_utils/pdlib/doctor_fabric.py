"""Checks of the KV cache's way between hosts: RDMA devices, fabrics, GIDs, MTU, NUMA, ports."""

from __future__ import annotations

from typing import Dict, Iterator, List, Tuple

from . import rdma
from .doctor_facts import ONE_FABRIC, Found, Json, Seen, error, info, ok, warning


def _planned(seen: Seen) -> Iterator[Tuple[str, str, Json]]:
    """Yield (host, device, its row, {} where the host has none) of the devices that the plan gives hosts with real GPUs."""
    for host, facts in seen.accelerators():
        for device in seen.planned_devices(host):
            yield host, device, rdma.by_device(facts["rdma"]).get(device, {})


def hca(seen: Seen) -> List[Found]:
    """Every RDMA device of the plan is there and up."""
    found = []
    for host, device, row in _planned(seen):
        others = sorted({str(r["device"]) for r in seen.hosts[host]["rdma"] if r["state"] == "ACTIVE"} - {device})
        fix = f"rdma_devices in its host_vars ({'active there: ' + ', '.join(others) if others else 'no other is active'})"
        if not row:
            found.append(error(host, f"there is no {device}", fix))
        elif row["state"] != "ACTIVE":
            found.append(
                error(host, f"{device} port {row['port']} is {row['state'].lower()}", f"its cable and switch port, or {fix}")
            )
        else:
            found.append(ok(host, f"{device} is up at {row['rate']}"))
    return found


def link_layer(seen: Seen) -> List[Found]:
    """Every RDMA device of the plan is on the fabric that the inventory declares."""
    found = []
    for host, device, row in _planned(seen):
        wanted = seen.plan["hosts"][host]["rdma_fabric"]
        if not row or wanted not in ("infiniband", "roce"):
            continue
        if row["fabric"] != wanted:
            what = f"{device} is {row['link_layer']} ({row['fabric']}), and rdma_fabric is {wanted}"
            found.append(error(host, what, f"rdma_fabric={row['fabric']} in its host_vars, or rdma_devices of the other fabric"))
        else:
            found.append(ok(host, f"{device} is {row['link_layer']}"))
    return found


def fabric(seen: Seen) -> List[Found]:
    """Both ends of every pair can speak the chosen transfer engine's transport."""
    backend, hosts = seen.plan.get("transfer_backend", ""), seen.plan.get("hosts", {})
    found, workers = [], seen.workers
    for pair in seen.plan.get("pairs", []):
        ends = [workers[pair[end]]["ranks"][0]["host"] for end in ("prefill", "decode")]
        kinds = [hosts[host]["rdma_fabric"] if hosts[host]["rdma_devices"] else "none" for host in ends]
        if backend in ONE_FABRIC and kinds[0] != kinds[1] and seen.real:
            what = f"{ends[0]} is {kinds[0]} and {ends[1]} is {kinds[1]}: {backend} cannot join them"
            found.append(error(f"{pair['prefill']} -> {pair['decode']}", what, "transfer_backend: auto (or nixl)"))
    if not found and seen.plan.get("pairs"):
        found.append(ok("all pairs", f"{backend}: {seen.plan['transfer_backend_reason']}"))
    return found


def silent_tcp(seen: Seen) -> List[Found]:
    """No pair goes over TCP while both hosts have active devices of one fabric."""
    active = {}
    for host, facts in seen.accelerators():
        active[host] = {row["fabric"] for row in facts["rdma"] if row["state"] == "ACTIVE"}
    found, workers = [], seen.workers
    for pair in seen.plan.get("pairs", []):
        ends = [workers[pair[end]]["ranks"][0]["host"] for end in ("prefill", "decode")]
        common = active.get(ends[0], set()) & active.get(ends[1], set())
        if ends[0] != ends[1] and pair["expected_transport"] == "tcp" and common:
            what = f"{' and '.join(ends)} both have active {' and '.join(sorted(common))} devices, and the plan takes TCP"
            fix = "rdma_devices and rdma_fabric of both (rdma_fabric: none keeps it so), transfer_backend: auto"
            found.append(warning(f"{pair['prefill']} -> {pair['decode']}", what, fix))
    return found


def gid(seen: Seen) -> List[Found]:
    """Every RoCE device of the plan has a RoCE v2 GID, which routed and modern fabrics need."""
    found = []
    for host, device, row in _planned(seen):
        if not row or row["fabric"] != "roce" or row["state"] != "ACTIVE":
            continue
        index, why = rdma.gid_index(row["gids"], str(seen.plan["hosts"][host]["address"]))
        if index is None:
            fix = f"an IP address on {row['netdev'] or 'its network device'} there; show_gids lists GIDs"
            found.append(error(host, f"{device}: {why}", fix))
        else:
            found.append(ok(host, f"{device}: GID index {index} ({why})"))
    return found


def peermem(seen: Seen) -> List[Found]:
    """RDMA can reach GPU memory: nvidia_peermem is loaded, or kernel and driver do dma-buf."""
    found = []
    for host in seen.rdma_hosts():
        facts = seen.hosts[host]["peermem"]
        if facts["module"]:
            found.append(ok(host, "nvidia_peermem is loaded"))
        elif facts["dmabuf"]:
            found.append(ok(host, "no nvidia_peermem; kernel and open driver do dma-buf"))
        else:
            what = "nvidia_peermem is not loaded, and the driver is not the open one that does dma-buf: no GPUDirect RDMA"
            found.append(error(host, what, "modprobe nvidia_peermem there, and its name in /etc/modules-load.d"))
    return found


def mtu(seen: Seen) -> List[Found]:
    """The network devices under RoCE have one MTU on all hosts."""
    seen_mtu: Dict[str, int] = {}
    for host, device, row in _planned(seen):
        if row and row["fabric"] == "roce" and row["mtu"]:
            seen_mtu[f"{host} {row['netdev']} ({device})"] = row["mtu"]
    if len(set(seen_mtu.values())) > 1:
        listed = ", ".join(f"{size} on {name}" for name, size in seen_mtu.items())
        what = f"MTU differs: {listed}; large messages are lost on the way to the smaller"
        return [
            error("RoCE netdevs", what, f"ip link set DEV mtu {max(seen_mtu.values())} on all of them, and the switch between")
        ]
    if seen_mtu and min(seen_mtu.values()) < 4200:
        return [
            info("RoCE netdevs", f"MTU {min(seen_mtu.values())}: RDMA frames of 4096 need 4200", "mtu 9000 on hosts and switches")
        ]
    return [ok("RoCE netdevs", f"MTU {next(iter(seen_mtu.values()))}")] if seen_mtu else []


def numa(seen: Seen) -> List[Found]:
    """Every worker has an RDMA device on the NUMA node of its GPUs."""
    found = []
    for host in seen.rdma_hosts():
        facts = seen.hosts[host]
        nodes = {str(row["device"]): row["numa"] for row in facts["rdma"] if row["numa"] is not None and row["numa"] >= 0}
        near = {nodes[device] for device in seen.planned_devices(host) if device in nodes}
        for worker, rank in seen.ranks(host):
            own = {c["numa"] for c in facts["gpus"] if c["index"] in rank["gpus"] and c["numa"] is not None and c["numa"] >= 0}
            if not own or not near:
                continue
            if not own & near:
                better = sorted(device for device, node in nodes.items() if node in own) or ["none there"]
                what = f"GPUs {rank['gpus']} are on NUMA node {min(own)}, its RDMA devices on {sorted(near)}"
                found.append(
                    warning(f"{host} {worker['name']}", what, f"rdma_devices in its host_vars: near are {', '.join(better)}")
                )
            else:
                found.append(ok(f"{host} {worker['name']}", f"NUMA node {min(own)}"))
    return found


def ports(seen: Seen) -> List[Found]:
    """Every port through which hosts must reach each other lets connections through."""
    found, good = [], 0
    for host, rows in seen.reach.items():
        for row in (row for row in rows if not row.get("stranger")):
            where, port = f"{host} -> {row['to']}", f"port {row['port']} ({row['what']})"
            if row["state"] == "open":
                good += 1
            elif row["state"] == "refused" and row["direct"]:
                what = f"{port} of {row['address']} refuses connections: what {row['to']} runs does not listen there"
                found.append(error(where, what, "see the units of that host; address and listen_address in its host_vars"))
            elif row["state"] == "unheard":
                # Its listener never came to be: nothing is known of the way.
                found.append(info(where, f"{port} of {row['address']} could not be tried: {row['why']}"))
            else:
                found.append(
                    error(where, f"{port} of {row['address']}: {row['why']}", f"firewall of {row['to']} and between: {_OPEN}")
                )
    return found + ([ok("between hosts", f"{good} ways are open")] if good and not found else [])


_OPEN = "prefill and decode hosts must reach each other on all ports (ZMQ picks random ones)"


def port_taken(seen: Seen) -> List[Found]:
    """Nobody else holds a port that the deployment is to listen on."""
    found = []
    for host, facts in seen.hosts.items():
        strays = facts.get("taken", [])
        for row in strays:
            what = f"port {row['port']} of {row['address']}, which {row['unit']} needs, is held by {row['holder']}"
            fix = "stop it, or set another worker_port_base, bootstrap_port_base or router_port"
            found.append(error(host, what, fix))
        if not strays and seen.plan.get("hosts", {}).get(host):
            found.append(ok(host, "free, or held by the deployment"))
    return found
