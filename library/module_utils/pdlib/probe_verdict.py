"""What became of a pair in the KV path probe: the transport that was seen, whether that is right, and why it is not. Pure."""

from __future__ import annotations

import re
from typing import Any, Dict, List, Mapping, Sequence, Tuple

Json = Dict[str, Any]
#: transfer backend -> the package that it needs, and what to read of its log
LIBRARIES = {"nixl": "nixl", "mooncake": "mooncake", "mooncake_tcp": "mooncake"}
_NAMES = {"nixl": "NIXL", "mooncake": "Mooncake", "mooncake_tcp": "Mooncake"}
#: UCX's transports by what a plan calls them (``expected_transport``); the first that a path has is what it is.
_UCX = (
    ("cuda_ipc", re.compile(r"cuda_ipc|rocm_ipc|ze_ipc")),
    ("rdma", re.compile(r"(rc|dc|ud|gga)(_\w+)?|srd")),
    ("tcp", re.compile(r"tcp")),
    ("shm", re.compile(r"posix|sysv|cma|knem|xpmem|self")),
)
_MOONCAKE = (
    ("cuda_ipc", re.compile(r"Using (Intra-Node )?NVLink transport", re.IGNORECASE)),
    ("rdma", re.compile(r"Using (RDMA|EFA|Barex) (host )?transport(?! for RPC)|installTransport, type=(rdma|barex|efa)", re.IGNORECASE)),
    ("tcp", re.compile(r"using TCP (host )?transport(?! for RPC)|TcpTransport: listen on port|installTransport, type=tcp", re.IGNORECASE)),
)  # fmt: skip
_WORDS = {"cuda_ipc": "NVLink (cuda_ipc)", "rdma": "RDMA", "tcp": "TCP", "shm": "shared memory", "": "an unknown transport"}


def seen(backend: str, op: str, gpu: bool, lines: Sequence[str]) -> Tuple[str, str]:
    """Return (transport, devices) that an end's log tells: ``cuda_ipc``, ``rdma``, ``tcp``, ``shm``, "" when it tells none.

    ``lines``: as probe_tool.evidence returns them; ``gpu``: whether GPU memory was moved.
    """
    if LIBRARIES[backend] == "mooncake":
        for name, pattern in _MOONCAKE:
            hits = [line for line in lines if pattern.search(line)]
            if hits:
                return name, ""
        return "", ""
    rows = [line.split(": ") for line in lines if line.startswith("UCX ") and not line.startswith("UCX self")]
    rows = [row for row in rows if len(row) == 5]
    # Between GPUs both ends are cuda's; there are tables of host memory to a GPU, too, by which nothing of a KV cache goes.
    fitting = [row for row in rows if "remote memory" in row[1] and row[1].count("cuda") == (2 if gpu else 0)]
    # Where a transport has no read or write of its own, UCX makes it of messages, and has no table of it.
    chosen = [row for row in fitting if f"remote memory {op}" in row[1]] or fitting or rows
    if not chosen:
        return "", ""
    used = re.findall(r"(\w+)/([\w:.-]+)", chosen[-1][4])
    for name, pattern in _UCX:
        devices = [device for transport, device in used if pattern.fullmatch(transport)]
        if devices:
            return name, ",".join(dict.fromkeys(devices))
    return "", ""


def judge(work: Mapping[str, Any], pair: Mapping[str, Any], result: Mapping[str, Any]) -> Json:
    """Return the verdict on one pair.

    ``work``: as probe.work makes it, ``pair``: one of its pairs, ``result``: what the program said of it. Returned: ``ok``,
    ``seen``, ``devices``, ``finding`` ("" when all is well), ``cause`` and ``fix``, and the figures.
    """
    here, there = work["ends"][pair["from"]], work["ends"][pair["to"]]
    row: Json = {
        key: result.get(key)
        for key in (
            "gb_s",
            "latency_us",
            "bytes",
            "transfers",
            "memory",
            "versions",
            "versions_there",
            "evidence",
            "evidence_there",
        )
    }
    row.update(expected=pair["expected"], seen="", devices="", cause="", fix="")
    if result["kind"]:
        at = there if result["there"] else here
        cause, fix = causes(work["backend"], result, at, here, there)
        finding = f"on {at['host']}: {result['error']} (when {here['host']} {result['stage']})"
        row.update(ok=False, finding=finding, cause=cause, fix=fix, gb_s=None)
        return row
    if result["sha256_sent"] != result["sha256_received"]:
        cause = "the transfer engine said that all was written, and what arrived was something else"
        fix = "another version of the transfer engine or of the driver; on GPUs try NCCL's tests and nvidia-smi's ECC counters"
        digests = f"sha256 {result['sha256_sent'][:12]} was sent and {result['sha256_received'][:12]} arrived"
        row.update(ok=False, finding=f"the contents differ: {digests} ({result['bytes']} bytes)", cause=cause, fix=fix, gb_s=None)
        return row
    gpu = result["memory"] == "VRAM"
    name, devices = seen(work["backend"], work["op"], gpu, result["evidence"])
    other, _ = seen(work["backend"], work["op"], gpu, result["evidence_there"])
    if LIBRARIES[work["backend"]] == "mooncake" and other and _rank(other) > _rank(name):
        # It goes as the slower of both ends can.
        name = other
    row.update(ok=True, seen=name, devices=devices, finding="")
    missing = _missing_device([*result["evidence"], *result["evidence_there"]])
    if name and not _as_good(name, pair["expected"], here["host"] == there["host"], gpu):
        cause, fix = _other_way(work["backend"], name, pair["expected"], result, here)
        finding = (
            f"the bytes went by {_WORDS[name]}{f' ({devices})' if devices else ''}, and {_WORDS[pair['expected']]} was expected"
        )
        row.update(ok=False, finding=finding, cause=cause, fix=fix)
    elif missing:
        row.update(ok=False, finding=f"the device {missing[0]} is not there ({missing[1]})", cause=_WRONG_DEVICE, fix=_DEVICE_FIX)
    return row


def not_started(trouble: str, there: bool) -> Json:
    """Return the result of a pair of which one end's program could not be started (``there``: the end that waits)."""
    empty: List[str] = []
    return {"kind": "start", "error": trouble, "there": there, "stage": "began", "evidence": empty, "evidence_there": empty}


def message(bad: Sequence[Mapping[str, Any]], count: int) -> str:
    """Return what stops the deployment: every path that is not as it should be (of ``count``), those of one cause together."""
    groups: Dict[Tuple[str, str], List[Mapping[str, Any]]] = {}
    for row in bad:
        groups.setdefault((row["cause"], row["fix"]), []).append(row)
    lines = [f"{len(bad)} of {count} paths of the KV cache are not as they should be, so nothing of the deployment was changed:"]
    for (cause, fix), rows in groups.items():
        for row in rows:
            prefill, decode = row["addresses"]["prefill"], row["addresses"]["decode"]
            lines.append(f"{row['prefill']} {prefill} -> {row['decode']} {decode}: {row['finding']}")
        lines += [f"  likely cause: {cause}", f"  to do: {fix}"]
    return "\n".join([*lines, "(all that was seen: kv_probe.json in results_dir; -e kv_probe=report deploys all the same)"])


def _rank(name: str) -> int:
    order = ["cuda_ipc", "rdma", "shm", "tcp"]
    return order.index(name) if name in order else -1


def _as_good(name: str, expected: str, one_host: bool, gpu: bool) -> bool:
    # Between host memories of one machine UCX leaves the network alone, and nobody wants it otherwise.
    return name == expected or (name == "shm" and one_host and not gpu and expected == "tcp")


_WRONG_DEVICE = "UCX_NET_DEVICES, made from rdma_devices and tcp_device, names a device that the host has not"
_DEVICE_FIX = "correct rdma_devices or tcp_device of the host (or UCX_NET_DEVICES in its engine_env)"


def _missing_device(lines: Sequence[str]) -> List[str]:
    """Return [device, what there is instead] of UCX's complaint about a device, [] without one."""
    for line in lines:
        match = re.search(r"network device '([^']+)' is not available, (?:please use one or more of: )?(.*)", line)
        if match:
            return [match[1], f"there are {match[2]}"]
    return []


def _other_way(backend: str, name: str, expected: str, result: Mapping[str, Any], here: Mapping[str, Any]) -> Tuple[str, str]:
    """Return (likely cause, fix) of a transport that is not the expected one."""
    lines = " ".join([*result["evidence"], *result["evidence_there"]])
    mooncake = LIBRARIES[backend] == "mooncake"
    if mooncake and name == "tcp" and "MC_FORCE_TCP" in lines:
        return "MC_FORCE_TCP is set", "take MC_FORCE_TCP out of engine_env, or set transfer_backend to mooncake_tcp"
    if mooncake and name == "tcp" and re.search(r"Found 0 HCAs|No RDMA devices|no HCA detected", lines):
        cause = "Mooncake found no RDMA device it may use, and falls back to TCP without a word"
        return (
            cause,
            "check rdma_devices against ibv_devices there (driver, port state, permission on /dev/infiniband), or set rdma_fabric to none",
        )
    if expected == "cuda_ipc":
        cause = "UCX found no CUDA IPC between the GPUs (UCX_TLS without cuda_ipc, containers with IPC or PID namespaces of their own, no peer access)"
        return (
            cause,
            "take UCX_TLS out of engine_env or add cuda_ipc to it; nvidia-smi topo -p2p r shows whether the GPUs reach each other",
        )
    if expected == "rdma":
        cause = "the RDMA device was not usable (port down, another fabric, UCX_TLS without rc, no permission on /dev/infiniband)"
        return (
            cause,
            f"ibv_devinfo on both hosts; rdma_devices of {here['host']} and of the other end; or set rdma_fabric to none",
        )
    return (
        f"a faster path than the plan knows of is open: {name}",
        "set transfer_backend, rdma_fabric or UCX_TLS so that the plan says it",
    )


#: (kind, pattern in the error and the logs) -> (likely cause, fix); {at}: the end where it happened, {host} and {address} of the
#: other one, {engine}: the transfer engine. The first that fits counts.
_CAUSES: Tuple[Tuple[str, str, str, str], ...] = (
    ("start", "", "{python} could not be started on {at}", "check runtime, engine_python and listen_address of {at}"),
    ("name", "", "the name does not resolve on {here}", "set address of {other} to an IP address, or name it in DNS or /etc/hosts of {here}"),
    (
        "refused", "", "{other} rejects what comes from {here}: a firewall, or {address} is another machine",
        "check address of {other}; open all TCP ports between {here} and {other}",
    ),
    (
        "silence", "", "packets from {here} to {address} are dropped: a firewall, a cut cable, or no route back",
        "open all TCP ports between {here} and {other} (try: nc -vz {address} 22), or correct address of {other}",
    ),
    ("route", "", "{here} has no route to {address}", "correct address of {other}, or the routes of {here}"),
    (
        "import", r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object", "a system library is missing on {at}: {match}",
        "install its package there (apt-get install libibverbs1 librdmacm1 libnuma1 libcurl4)",
    ),
    ("import", "", "{python} on {at} has no {engine}", "install {package} in it, or set another transfer_backend"),
    (
        "gpu", r"out of memory", "the GPU has no room for 64 MiB and a CUDA context: something else runs there",
        "free GPU {gpu} of {at}, or set kv_probe to never",
    ),
    ("gpu", "", "{python} on {at} cannot use GPU {gpu}", "try there: {python} -c 'import torch; torch.zeros(1).cuda()'"),
    (
        "*", r"network device '([^']+)' is not available", "there is no device {match} on {at}",
        "correct rdma_devices or tcp_device of {at} (or UCX_NET_DEVICES in its engine_env)",
    ),
    (
        "*", r"Cannot allocate memory|ibv_reg_mr|memlock", "memory cannot be pinned for RDMA: the limit is too low",
        "raise memlock for the workers' user on {at} (ulimit -l unlimited; LimitMEMLOCK=infinity)",
    ),
    ("device", "", "disaggregation-ib-device leaves a GPU out", "correct rdma_devices of {at}"),
    (
        "engine", r"No such device|no usable transports", "{engine} finds no device on {at} that it may use",
        "correct rdma_devices and tcp_device of {at}, and UCX_TLS and UCX_NET_DEVICES in its engine_env",
    ),
    ("engine", "", "{engine} could not be set up on {at}", "the lines of its log stand in results/kv_probe.json"),
    (
        "transfer", r"gid|GID|retry exceeded|RTR", "the RDMA connection could not be made: another GID index or fabric, MTU, or a port that is down",
        "compare show_gids and ibv_devinfo of both hosts; set MC_GID_INDEX or UCX_IB_GID_INDEX in engine_env",
    ),
    (
        "transfer", "", "the control connection works and {engine}'s own do not: a firewall lets only some ports through, or the device leads elsewhere",
        "open all TCP ports between {here} and {other} ({engine} takes random ones), or set tcp_device to the one with {address}",
    ),
    (
        "timeout", "", "{engine} hangs: its own connections are dropped by a firewall, or its device leads elsewhere",
        "open all TCP ports between {here} and {other} ({engine} takes random ones), or set tcp_device to the one with {address}",
    ),
    ("died", "", "{engine} crashed on {at}", "the lines of its log stand in results/kv_probe.json"),
    ("*", "", "the other end went away", "deploy again; the lines of its log stand in results/kv_probe.json"),
)  # fmt: skip


def causes(
    backend: str, result: Mapping[str, Any], at: Mapping[str, Any], here: Mapping[str, Any], there: Mapping[str, Any]
) -> Tuple[str, str]:
    """Return (likely cause, fix) of a pair that did not work; ``at``: the end where it happened."""
    text = "\n".join([result["error"], *(result["evidence_there"] if result["there"] else result["evidence"])])
    for kind, pattern, cause, fix in _CAUSES:
        match = re.search(pattern, text) if kind in ("*", result["kind"]) else None
        if match:
            words = {
                "at": at["host"], "here": here["host"], "other": there["host"], "address": there["address"], "gpu": at["gpu"],
                "python": at["python"], "engine": _NAMES[backend], "package": LIBRARIES[backend],
                "match": match[1] if match.groups() else "",
            }  # fmt: skip
            return cause.format(**words), fix.format(**words)
    raise AssertionError("the last row fits all")
