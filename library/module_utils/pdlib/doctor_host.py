"""Checks of single hosts: GPUs, drivers, containers, memory, limits, folders, clocks. Each sees all hosts and says what it found."""

from __future__ import annotations

import re
from typing import Dict, List

from .doctor_facts import Found, Seen, by_value, error, gib, info, numbers, ok, warning
from .runtimes import CONTAINERS

#: CUDA's major version -> the oldest driver that runs it (NVIDIA, "CUDA Toolkit release notes", minor version compatibility).
OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.00"}
#: Seconds that clocks may differ by: logs of several hosts are read side by side, and keys have dates.
_CLOCK_S = 2.0
#: SGLang raises its own limit to 65535 and only warns where it may not.
_OPEN_FILES = 4096
_MIB, _GIB = 2**20, 2**30
#: Share of memory that may lie in huge pages which nobody uses.
_IDLE_PAGES = 0.1


def unreachable(seen: Seen) -> List[Found]:
    """Every host answers Ansible."""
    found = [error(host, why, f"ssh {host} by hand (docs/hosts.md)") for host, why in seen.unreachable.items()]
    return found + ([ok(", ".join(seen.hosts), "answered")] if seen.hosts else [])


def inventory(seen: Seen) -> List[Found]:
    """What the inventory declares is on the hosts, the ratio fits them, and it is what is deployed."""
    if seen.refused:
        return [error("inventory", seen.refused, "deploy_pd.yml refuses it in the same words: set what they name")]
    if seen.deployed and seen.leaving:
        what = f"a deploy would stop or start anew {', '.join(sorted(seen.leaving))}: the inventory has changed since"
        return [info("inventory", what, "ansible-playbook deploy_pd.yml --check --diff")]
    if not seen.plan:
        return []
    state = "is deployed" if seen.deployed else "would be deployed"
    return [ok("inventory", f"{seen.plan['ratio']}, {seen.plan['engine']} {seen.plan['engine_version']}, {state}")]


def gpu(seen: Seen) -> List[Found]:
    """The GPUs that the deployment uses are there."""
    found = []
    for host, facts in seen.accelerators():
        there = {card["index"]: card["name"] for card in facts["gpus"]}
        wanted = sorted({index for _, rank in seen.ranks(host) for index in rank["gpus"]})
        missing = [str(index) for index in wanted if index not in there]
        if not there:
            why = facts["driver"].get("error") or "nvidia-smi lists none"
            found.append(error(host, f"no GPU: {why}", "install the NVIDIA driver, or take the host out of the worker groups"))
        elif missing:
            found.append(error(host, f"no GPU {', '.join(missing)}; it has {sorted(there)}", "gpus in its host_vars"))
        else:
            kinds = sorted({str(name) for name in there.values()})
            found.append(ok(host, f"{len(there)} x {', '.join(kinds)}"))
    return found


def driver(seen: Seen) -> List[Found]:
    """The driver is new enough for the CUDA runtime that the engine's wheels bring."""
    found = []
    for host, facts in seen.accelerators():
        version = facts["driver"].get("version", "")
        cuda = _cuda(facts, seen.wheel_cuda.get(host, ""))
        if not version:
            continue
        oldest = OLDEST_DRIVER.get(numbers(cuda)[0]) if cuda else None
        if oldest and numbers(version) < numbers(oldest):
            fix = f"install a driver from {oldest} on, or an engine_version made for an older CUDA"
            found.append(error(host, f"driver {version} is too old for the engine's CUDA {cuda}, which needs {oldest}", fix))
        else:
            found.append(ok(host, f"driver {version}" + (f", the engine brings CUDA {cuda}" if cuda else "")))
    return found


def _cuda(facts: Dict[str, Dict[str, Dict[str, str]]], locked: str) -> str:
    """The CUDA runtime that is installed with the engine, else the one that its lock file names."""
    for packages in facts.get("packages", {}).values():
        for name, version in packages.items():
            if name.startswith("nvidia-cuda-runtime"):
                return version
    return locked


def gpu_memory(seen: Seen) -> List[Found]:
    """Every GPU has as much free memory as mem_fraction will take."""
    found = []
    for host, facts in seen.accelerators():
        fraction = seen.settings.get(host, {}).get("mem_fraction")
        used = {index for _, rank in seen.ranks(host) for index in rank["gpus"]}
        busy = {row["gpu"] for row in facts["gpu_processes"] if row["ours"]}
        # In a container nvidia-smi shows no process, or other numbers: a unit that runs holds its GPUs' memory.
        running = {row["name"] for row in facts["units"] if row["state"] == "running"}
        busy |= {i for _, rank in seen.ranks(host) if rank["unit"][: -len(".service")] in running for i in rank["gpus"]}
        for card in facts["gpus"]:
            if card["index"] not in used or not card["memory_mib"] or fraction is None:
                continue
            if card["index"] in busy:
                found.append(ok(f"{host} GPU {card['index']}", "a worker of ours holds it"))
                continue
            share = card["free_mib"] / card["memory_mib"]
            where, said = f"{host} GPU {card['index']}", f"{card['free_mib']} of {card['memory_mib']} MiB are free"
            if share < fraction:
                fix = f"end what holds it (nvidia-smi), or set mem_fraction to at most {max(0.0, int(share * 100) / 100)}"
                found.append(error(where, f"{said}, and mem_fraction={fraction} takes {fraction:.0%}", fix))
            else:
                found.append(ok(where, said))
    return found


def gpu_process(seen: Seen) -> List[Found]:
    """Nobody else's process holds memory of a GPU that the deployment uses."""
    found = []
    for host, facts in seen.accelerators():
        used = {index for _, rank in seen.ranks(host) for index in rank["gpus"]}
        strays = [row for row in facts["gpu_processes"] if not row["ours"] and row["gpu"] in used]
        for row in strays:
            what = f"process {row['pid']} ({row['command'][:60] or 'not to be seen'}) holds {row['used_mib']} MiB"
            fix = f"ssh {host} kill {row['pid']}, if it is a leftover; else set gpus so that it is left out"
            found.append(warning(f"{host} GPU {row['gpu']}", what, fix))
        if not strays and facts["gpus"]:
            found.append(ok(host, "no process but ours"))
    return found


def container_gpu(seen: Seen) -> List[Found]:
    """Where the engine runs in a container: its client works, and containers get GPUs."""
    found = []
    for host, facts in seen.hosts.items():
        client = seen.settings.get(host, {}).get("runtime", "venv")
        if client not in CONTAINERS or not seen.ranks(host):
            continue
        seen_there = facts["containers"].get(client, {})
        if seen_there.get("error"):
            fix = f"install and start {client} there, or set runtime to venv"
            found.append(error(host, f"{client}: {seen_there['error']}", fix))
        elif not seen.accelerated.get(host):
            found.append(ok(host, f"{client} answers"))
        elif not seen_there.get("gpu"):
            tool = "nvidia-ctk runtime configure --runtime=docker && systemctl restart docker"
            tool = tool if client == "docker" else "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
            what = f"{client} knows no NVIDIA runtime and no CDI device nvidia.com/gpu: containers get no GPU"
            found.append(error(host, what, f"install nvidia-container-toolkit there, then {tool}"))
        else:
            found.append(ok(host, f"{client} gives containers GPUs ({seen_there['gpu']})"))
    return found


def memlock(seen: Seen) -> List[Found]:
    """Units may lock as much memory as RDMA registers."""
    found = []
    needed = set(seen.rdma_hosts())
    for host, facts in seen.hosts.items():
        limits = {unit["name"]: unit["memlock"] for unit in facts.get("units", []) if unit.get("memlock") is not None}
        shell = facts["limits"]["memlock"]
        short = {name: limit for name, limit in limits.items() if 0 <= limit < 64 * _GIB and name != "pd-router"}
        if host not in needed:
            continue
        if short:
            what = f"{', '.join(sorted(short))} may lock {gib(min(short.values()))} of memory: RDMA registers the whole KV cache"
            found.append(error(host, what, _MEMLOCK))
        elif not limits and 0 <= shell < 64 * _GIB and seen.settings.get(host, {}).get("service_manager") != "systemd":
            # systemd's units have a limit of their own; supervisord hands on that of the shell which deploys.
            found.append(error(host, f"whoever deploys may lock {gib(shell)} of memory: units inherit it", _MEMLOCK))
        else:
            found.append(ok(host, "memory may be locked"))
    return found


_MEMLOCK = "service_manager: systemd (its units ask for no limit), or `* - memlock unlimited` in /etc/security/limits.conf and log in anew"


def open_files(seen: Seen) -> List[Found]:
    """Units may open as many files as connections come."""
    found = []
    for host, facts in seen.hosts.items():
        limits = {unit["name"]: unit["nofile"] for unit in facts.get("units", []) if unit.get("nofile") is not None}
        if not limits and seen.ranks(host) and seen.settings.get(host, {}).get("service_manager") != "systemd":
            limits = {"units (as whoever deploys)": facts["limits"]["nofile"]}
        low = {name: limit for name, limit in limits.items() if 0 <= limit < _OPEN_FILES}
        if low:
            what = f"{', '.join(sorted(low))} may open {min(low.values())} files: requests in flight take two each"
            found.append(warning(host, what, "service_manager: systemd, or `* - nofile 65535` in /etc/security/limits.conf"))
        elif limits:
            found.append(ok(host, f"{min((n for n in limits.values() if n >= 0), default=-1)}"))
    return found


def hugepages(seen: Seen) -> List[Found]:
    """Memory is not set aside as huge pages that nobody uses."""
    found = []
    for host, facts in seen.hosts.items():
        pages = facts["memory"]
        idle = pages["hugepages_free"] * pages["hugepage_bytes"]
        if pages["total"] and idle > _IDLE_PAGES * pages["total"]:
            what = f"{gib(idle)} of {gib(pages['total'])} lie in free huge pages, which engines and the page cache cannot use"
            found.append(warning(host, what, "sysctl vm.nr_hugepages=0 there, unless another program needs them"))
        else:
            found.append(ok(host, f"{gib(idle)} idle"))
    return found


def shm(seen: Seen) -> List[Found]:
    """/dev/shm is large enough for the processes of a worker to meet in."""
    found = []
    for host, facts in seen.hosts.items():
        if not seen.ranks(host) or not seen.real:
            continue
        size = facts["shm"]["total"]
        if size < _GIB:
            what = f"/dev/shm has {gib(size)}: NCCL and the engine's processes share buffers there"
            found.append(warning(host, what, "mount -o remount,size=16g /dev/shm there (in a container: --shm-size 16g)"))
        else:
            found.append(ok(host, gib(size)))
    return found


def disk(seen: Seen) -> List[Found]:
    """The folders of state, virtualenvs, models and caches have room."""
    found = []
    for host, facts in seen.hosts.items():
        bad = 0
        heavy = seen.real and bool(seen.ranks(host))
        for name, row in facts["disks"].items():
            # An engine with its CUDA libraries takes some 10 GB, a model more.
            least, little = (_GIB, 20 * _GIB) if heavy and name != "state_dir" else (200 * _MIB, 200 * _MIB)
            if row["free"] < little:
                bad += 1
                what = f"{name} {row['path']} has {gib(row['free'])} free of {gib(row['total'])}"
                found.append((error if row["free"] < least else warning)(host, what, f"make room there, or set {name}"))
        if facts["disks"] and not bad:
            tight = min(facts["disks"].values(), key=lambda row: float(row["free"]))
            found.append(ok(host, f"at least {gib(tight['free'])} free"))
    return found


def names(seen: Seen) -> List[Found]:
    """Hosts resolve the names that the plan knows the others by, and their own."""
    found = []
    for host, facts in seen.hosts.items():
        lost = sorted(name for name, address in facts["names"].items() if not address)
        own = facts["hostname"]
        others = [name for name in lost if name != own]
        if others:
            fix = "address: an IP address in host_vars, or the name in its /etc/hosts"
            found.append(error(host, f"{', '.join(others)} cannot be resolved there", fix))
        elif lost:
            what = f"it does not know its own name, {own}: torch's and NCCL's rendezvous may ask for it"
            found.append(warning(host, what, f"its /etc/hosts: {own} with its address"))
        else:
            found.append(ok(host, f"{len(facts['names'])} resolved"))
    return found


def clock(seen: Seen) -> List[Found]:
    """Clocks agree with the controller's, as far as a call's round trip can tell."""
    found = []
    for host, (ahead, doubt) in seen.clocks.items():
        if abs(ahead) - doubt > _CLOCK_S:
            word = "ahead of" if ahead > 0 else "behind"
            what = f"its clock is {abs(ahead):.1f} s {word} the controller's (give or take {doubt:.1f} s)"
            fix = (
                "chrony or systemd-timesyncd there (timedatectl set-ntp true); figures of a run rest on the client's clock alone"
            )
            found.append(warning(host, what, fix))
        else:
            found.append(ok(host, f"within {max(abs(ahead), doubt):.1f} s"))
    return found


#: Packages whose versions must be one on all hosts: workers speak their private protocols with each other.
_ALIKE = re.compile(r"sglang|vllm(?:-cpu)?|pdbench|torch|nixl(?:-cu\d+)?|mooncake-transfer-engine[\w-]*")
_MOONCAKE = "mooncake-transfer-engine"


def versions(seen: Seen) -> List[Found]:
    """Engine and transfer engine are installed, in one version on all hosts with workers."""
    have: Dict[str, Dict[str, str]] = {}
    found = []
    backend = str(seen.plan.get("transfer_backend", ""))
    needed = _MOONCAKE if backend.startswith("mooncake") else backend
    for host, facts in seen.hosts.items():
        packages: Dict[str, str] = {name: version for row in facts["packages"].values() for name, version in row.items()}
        if not seen.ranks(host):
            continue
        # Variants of Mooncake are one module.
        own = {
            _MOONCAKE if name.startswith(_MOONCAKE) else name: version
            for name, version in packages.items()
            if _ALIKE.fullmatch(name)
        }
        for name, version in own.items():
            have.setdefault(name, {})[host] = version
        if seen.real and own and needed in (_MOONCAKE, "nixl") and needed not in own:
            fix = f"ansible-playbook deploy_pd.yml; with runtime: existing, install {needed} beside the engine"
            found.append(error(host, f"{needed} is not installed beside the engine, and transfer_backend is {backend}", fix))
    said = []
    for name, by_host in sorted(have.items()):
        if len(set(by_host.values())) > 1:
            fix = "ansible-playbook deploy_pd.yml makes virtualenvs alike; with runtime: existing, install one version everywhere"
            found.append(error(" and ".join(by_host), f"{name} is {by_value(by_host)}", fix))
        else:
            said.append(f"{name} {next(iter(by_host.values()))}")
    return found or ([ok("all hosts", ", ".join(said))] if said else [])
