"""What doctor.yml judges from, and the words it judges in. Pure: what was seen goes in, findings come out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

Json = Dict[str, Any]
#: Most severe first; doctor.yml fails on the first kind alone.
SEVERITIES = ("error", "warning", "info", "ok")
#: Transfer engines that only work where both ends are on one RDMA fabric.
ONE_FABRIC = ("mooncake",)


@dataclass(frozen=True)
class Found:
    """What one check says of one host, pair or worker (``host``); ``fix``: the variable to set or the command to type."""

    severity: str
    host: str
    evidence: str
    fix: str = ""


def error(host: str, evidence: str, fix: str) -> Found:
    """What keeps the deployment from working, or from working as planned."""
    return Found("error", host, evidence, fix)


def warning(host: str, evidence: str, fix: str) -> Found:
    """What works, and will cost speed or fail later."""
    return Found("warning", host, evidence, fix)


def info(host: str, evidence: str, fix: str = "") -> Found:
    """What a person should know."""
    return Found("info", host, evidence, fix)


def ok(host: str, evidence: str) -> Found:
    """What was looked at and is well."""
    return Found("ok", host, evidence)


@dataclass(frozen=True)
class Seen:
    """All that was seen.

    ``plan``: the deployed one, else the one that deploy_pd.yml would make, else {}. ``deployed``: whether it is the deployed one.
    ``refused``: why the inventory cannot be planned ("" when it can). ``leaving``: workers that a deploy would stop or start
    anew. ``hosts``: host -> what doctor_look.host saw there. ``unreachable``: host -> why nothing was seen. ``settings``: host ->
    ``runtime``, ``mem_fraction`` and folders. ``accelerated``: host -> whether its workers use real GPUs. ``reach``: host ->
    what doctor_reach saw from there. ``front``: what doctor_ask heard from router and workers ({}: nobody was asked).
    ``wheel_cuda``: host -> the CUDA runtime that its engine's lock file brings ("" where it is not known). ``clocks``: host ->
    (seconds that its clock is ahead of the controller's, seconds that this may be wrong by). ``probe``: what the
    last KV path probe left ({}: none).
    """

    plan: Json = field(default_factory=dict)
    deployed: bool = False
    refused: str = ""
    leaving: Mapping[str, str] = field(default_factory=dict)
    hosts: Mapping[str, Json] = field(default_factory=dict)
    unreachable: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Json] = field(default_factory=dict)
    accelerated: Mapping[str, bool] = field(default_factory=dict)
    reach: Mapping[str, Sequence[Json]] = field(default_factory=dict)
    front: Json = field(default_factory=dict)
    wheel_cuda: Mapping[str, str] = field(default_factory=dict)
    clocks: Mapping[str, Tuple[float, float]] = field(default_factory=dict)
    probe: Json = field(default_factory=dict)

    @property
    def workers(self) -> Dict[str, Json]:
        """The plan's workers by name."""
        return {worker["name"]: worker for worker in self.plan.get("workers", [])}

    @property
    def real(self) -> bool:
        """Whether a real engine is planned (an emulated one needs next to nothing of a host)."""
        return bool(self.plan) and not self.plan.get("emulated", True)

    def accelerators(self) -> Iterator[Tuple[str, Json]]:
        """Yield the hosts that were examined and whose workers use real GPUs."""
        return ((host, facts) for host, facts in self.hosts.items() if self.accelerated.get(host))

    def ranks(self, host: str) -> List[Tuple[Json, Json]]:
        """Return (worker, rank) of what the plan has on a host."""
        return [(w, rank) for w in self.plan.get("workers", []) for rank in w["ranks"] if rank["host"] == host]

    def rdma_hosts(self) -> List[str]:
        """Return the examined hosts between which the plan moves KV caches by RDMA."""
        workers, names = self.workers, set()
        for pair in self.plan.get("pairs", []):
            if pair["expected_transport"] == "rdma":
                names |= {rank["host"] for end in ("prefill", "decode") for rank in workers[pair[end]]["ranks"]}
        return [host for host in self.hosts if host in names and self.accelerated.get(host)]

    def planned_devices(self, host: str) -> List[str]:
        """Return the RDMA devices that the plan gives a host."""
        return [str(name) for name in self.plan.get("hosts", {}).get(host, {}).get("rdma_devices", [])]

    def log(self, host: str, unit: str) -> str:
        """Return where the log of a unit is."""
        entry = self.plan.get("hosts", {}).get(host, {})
        if entry.get("service_manager") == "systemd":
            return f"ssh {host} journalctl -u {unit}"
        return f"{entry['state_dir']}/log/{unit}.log on {host}" if entry else f"the log of {unit} on {host}"

    def units(self) -> Iterator[Tuple[str, Json]]:
        """Yield (host, unit) of every unit that a host's service manager knows."""
        return ((host, unit) for host, facts in self.hosts.items() for unit in facts.get("units", []))


def numbers(version: str) -> Tuple[int, ...]:
    """Return a version's leading numbers, for comparison: ``580.65.06`` -> (580, 65, 6)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def gib(count: float) -> str:
    """Return bytes as people say them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def by_value(values: Mapping[str, Any]) -> str:
    """Return who has what, those with the same together: ``1.5.1 on n1 and n2, 1.4.0 on n3``."""
    groups: Dict[str, List[str]] = {}
    for name, value in values.items():
        groups.setdefault(str(value), []).append(name)
    return ", ".join(f"{value} on {' and '.join(names)}" for value, names in groups.items())
