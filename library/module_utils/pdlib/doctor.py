"""Every check of doctor.yml in one table, what they find, and how that is shown. Pure: what was seen goes in (doctor_facts.Seen).

``docs/doctor.md`` is made from this table; tests/unit/test_doctor.py provokes every check and refuses one that none provokes.
"""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Sequence, Tuple

from . import doctor_exposure as exposure
from . import doctor_fabric as fabric
from . import doctor_host as host
from . import doctor_serving as serving
from .doctor_facts import SEVERITIES, Found, Seen

Json = Dict[str, Any]
_WIDTH = 96


@dataclass(frozen=True)
class Check:
    """One check: ``id``, the question it answers (its docstring says it), and ``instead``: what a person types for it."""

    id: str
    run: Callable[[Seen], List[Found]]
    instead: str

    @property
    def holds(self) -> str:
        """What holds when nothing is found."""
        return " ".join((inspect.getdoc(self.run) or "").split()).rstrip(".")


@dataclass(frozen=True)
class Finding:
    """What a check says of one host, pair or worker."""

    id: str
    severity: str
    host: str
    evidence: str
    fix: str


_CHECKS = (
    # -- hosts
    Check("host", host.unreachable, "`ssh HOST`"),
    Check("inventory", host.inventory, "`deploy_pd.yml --check`"),
    Check("gpu", host.gpu, "`nvidia-smi -L`"),
    Check("driver", host.driver, "`nvidia-smi`, against the engine's release notes"),
    Check("gpu-memory", host.gpu_memory, "`nvidia-smi`, before MEM_FRACTION is reduced"),
    Check("gpu-process", host.gpu_process, "`nvidia-smi --query-compute-apps=pid,used_memory --format=csv`"),
    Check("container-gpu", host.container_gpu, "`docker run --rm --gpus all IMAGE nvidia-smi`"),
    Check("memlock", host.memlock, "`ulimit -l`, `systemctl show -p LimitMEMLOCK UNIT`"),
    Check("open-files", host.open_files, "`ulimit -n`"),
    Check("hugepages", host.hugepages, "`grep Huge /proc/meminfo`"),
    Check("shm", host.shm, "`df -h /dev/shm`"),
    Check("disk", host.disk, "`df -h`"),
    Check("names", host.names, "`getent hosts NAME`"),
    Check("clock", host.clock, "`date` on every host"),
    Check("versions", host.versions, "`pip list` on every host"),
    # -- between hosts
    Check("hca", fabric.hca, "`ibstat | grep -A10 mlx5_0`"),
    Check("link-layer", fabric.link_layer, '`ibstat | grep "Link layer"`'),
    Check("fabric", fabric.fabric, '`ibstat | grep "Link layer"` on both hosts'),
    Check("silent-tcp", fabric.silent_tcp, "the throughput, once it is measured"),
    Check("gid", fabric.gid, "`show_gids`"),
    Check("peermem", fabric.peermem, "`lsmod | grep peermem`"),
    Check("mtu", fabric.mtu, "`ip link` on both hosts, `ping -M do -s 8972`"),
    Check("numa", fabric.numa, "`nvidia-smi topo -m`"),
    Check("ports", fabric.ports, "`nc -l PORT` there, `nc -zv HOST PORT` here"),
    Check("port-taken", fabric.port_taken, "`ss -ltnp`"),
    Check("exposure", exposure.exposure, "`nc -zv HOST PORT` from a host that has no business there"),
    Check("wildcard", exposure.wildcard, "`ss -ltnp`, for `0.0.0.0` and `*`"),
    # -- what is deployed
    Check("unit", serving.unit, "`systemctl status 'pd-*'`"),
    Check("restarts", serving.restarts, "`systemctl show -p NRestarts UNIT`"),
    Check("oom", serving.oom, "`journalctl -k | grep -i 'killed process'`"),
    Check("router", serving.router, "`curl ROUTER/readiness`"),
    Check("worker-health", serving.worker_health, "`curl WORKER/health`"),
    Check("membership", serving.membership, "`curl ROUTER/workers`"),
    Check(
        "bootstrap-port", serving.bootstrap_port, "both command lines: `--prefill URL PORT`, `--disaggregation-bootstrap-port`"
    ),
    Check("pair", serving.pair, "a request to both ends, pair by pair"),
    Check("kv-probe", serving.kv_probe, "a transfer benchmark between two hosts, once NIXL or Mooncake is installed"),
    Check("stream", serving.stream, "`curl -N`, and a watch: TTFT shows 0 in PD disaggregation"),
    Check("slow-down", serving.slow_down, "remembering who called `/slow_down`"),
    Check("profiler", serving.profiler, "remembering who called `/start_profile`"),
    Check("kv-failures", serving.kv_failures, "`curl WORKER/metrics | grep failed`"),
    Check("kv-log", serving.kv_log, '`grep "Failed to get kvcache"` in the logs'),
    Check("transport", serving.transport, "`grep 'Using TCP transport'` in the logs"),
    Check("transfer-backend", serving.backend, "both command lines: `--disaggregation-transfer-backend`"),
    Check("kv-layout", serving.kv_layout, "both command lines: `--page-size`, `--kv-cache-dtype`"),
    Check("running-version", serving.running_version, "`curl WORKER/server_info`"),
    Check("busy", serving.busy, "asking around"),
)
CHECKS: Dict[str, Check] = {check.id: check for check in _CHECKS}


def examine(seen: Seen) -> List[Finding]:
    """Return what every check found, most severe first, else in the table's order."""
    found = [Finding(check.id, f.severity, f.host, f.evidence, f.fix) for check in _CHECKS for f in check.run(seen)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def report(findings: Sequence[Finding]) -> Json:
    """Return results/doctor.json: ``ok`` is false when one finding is an error."""
    rows = [{"id": f.id, "severity": f.severity, "host": f.host, "evidence": f.evidence, "fix": f.fix} for f in findings]
    return {"schema": 1, "ok": not any(f.severity == "error" for f in findings), "findings": rows}


def _rows(findings: Sequence[Finding]) -> List[Tuple[str, str, str, str, str]]:
    """Return the table's rows; what is well takes one line a check."""
    rows = [(f.severity.upper(), f.host, f.id, f.evidence, f.fix) for f in findings if f.severity != "ok"]
    for check in _CHECKS:
        good = [f for f in findings if f.id == check.id and f.severity == "ok"]
        hosts = list(dict.fromkeys(f.host for f in good))
        said = list(dict.fromkeys(f.evidence for f in good if f.evidence))
        if good:
            where = ", ".join(hosts) if len(", ".join(hosts)) <= 30 else f"{hosts[0]} and {len(hosts) - 1} more"
            rows.append(("ok", where, check.id, "; ".join(said[:3]) + ("; ..." if len(said) > 3 else ""), ""))
    return rows


def table(findings: Sequence[Finding]) -> str:
    """Return the findings as a person reads them: severity, where, check, evidence, and below what puts it right."""
    rows = [("severity", "where", "check", "evidence", ""), *_rows(findings)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    widths[1] = min(widths[1], 34)
    indent = " " * (sum(widths) + 6)
    lines = []
    for row in rows:
        head = "  ".join(cell.ljust(width) for cell, width in zip(row, widths))
        said = [piece for line in row[3].splitlines() for piece in textwrap.wrap(line, _WIDTH) or [""]] or [""]
        lines.append(f"{head}  {said[0]}".rstrip())
        lines += [indent + piece for piece in said[1:]]
        lines += [indent + piece for piece in textwrap.wrap(f"-> {row[4]}", _WIDTH, subsequent_indent="   ")] if row[4] else []
    lines.insert(1, "  ".join("-" * width for width in widths) + "  " + "-" * 8)
    return "\n".join(lines)


def verdict(findings: Sequence[Finding], hosts: int) -> str:
    """Return the one line that sums up."""
    counts = {kind: sum(f.severity == kind for f in findings) for kind in SEVERITIES}
    checks = len({f.id for f in findings})
    what = f"{checks} checks of {hosts} host{'s' if hosts != 1 else ''}"
    if not counts["error"] and not counts["warning"]:
        return f"doctor: all is well ({what})"
    parts = [f"{counts[kind]} {kind}{'s' if counts[kind] != 1 else ''}" for kind in ("error", "warning") if counts[kind]]
    worst = findings[0]
    return f"doctor: {' and '.join(parts)} in {what}; first: {worst.id} on {worst.host}: {worst.evidence.splitlines()[0][:160]}"
