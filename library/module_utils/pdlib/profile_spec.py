"""What one profile is (`profile.yml`): whose steps are recorded, with which command, where traces lie."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping

from . import bench_load
from .errors import UserError, listing

Json = Dict[str, Any]
#: Engines with SGLang's /start_profile (num_steps) and /slow_down.
_ENGINES = ("sglang", "emulated")
#: What the ids of profiles begin with; those of runs begin with a date.
PREFIX = "profile-"


def check(plan: Mapping[str, Any], cluster: Mapping[str, Any]) -> None:
    """Raise UserError for what cannot be profiled."""
    role = cluster["role"]
    if role is None:
        raise UserError("profile.yml needs -e role=prefill or -e role=decode: whose forward steps are recorded")
    if plan["engine"] not in _ENGINES:
        raise UserError(
            f"profile.yml records with SGLang's profiler, which engine {plan['engine']} has not; it takes {listing(_ENGINES)}"
        )
    workers = [worker for worker in plan["workers"] if worker["role"] == role]
    if not workers:
        raise UserError(f"role={role}: the ratio {plan['ratio']} has no {role} worker; take one like 1p1d")
    for worker in workers:
        for rank in worker["ranks"]:
            if str(rank["env"].get("SGLANG_PROFILE_V2", "0")).lower() not in ("0", "false", ""):
                raise UserError(
                    f"SGLANG_PROFILE_V2 is set for {worker['name']} (engine_env): with it, SGLang's scheduler dies of "
                    "/stop_profile, which ends a profile that runs out of requests; leave it out"
                )
    points = bench_load.points(cluster)
    if len(points) != 1:
        raise UserError(
            f"profile.yml takes one load point, and these variables make {len(points)}: give one bench_concurrency, bench_batch "
            "or bench_request_rate"
        )
    # The rest of the load (traces, files) is checked by pdbench, which reads it.
    shortest = str(cluster["bench_output_len"])
    if role == "decode" and shortest.isdigit() and int(shortest) <= cluster["profile_steps"]:
        raise UserError(
            f"bench_output_len={shortest} ends every request before decode has {cluster['profile_steps']} steps (profile_steps) of "
            f"one batch: take {2 * cluster['profile_steps']} or more"
        )


def wanted(plan: Mapping[str, Any], role: str) -> Dict[str, Dict[str, int]]:
    """Return how many traces each host's units write: ``{host: {unit: ranks}}``."""
    found: Dict[str, Dict[str, int]] = {}
    for worker in plan["workers"]:
        for rank in worker["ranks"] if worker["role"] == role else []:
            # An emulated worker is one process, whatever its GPUs; on CPU there are none.
            ranks = 1 if plan["emulated"] else len(rank["gpus"]) or 1
            found.setdefault(rank["host"], {})[rank["unit"][: -len(".service")]] = ranks
    return found


def make(bench: Mapping[str, Any], plan: Mapping[str, Any], cluster: Mapping[str, Any]) -> Json:
    """Turn a run (`bench_spec.make`) into a profile: the same load, sent by `pdbench profile`; raise UserError.

    ``traces``: by host, the units that write some, and how many.
    """
    check(plan, cluster)
    role, run_id = cluster["role"], f"{PREFIX}{bench['run_id']}-{cluster['role']}"
    clients = {}
    for name, me in bench["clients"].items():
        argv = list(me["argv"])
        argv[argv.index("run")] = "profile"
        clients[name] = {**me, "argv": argv + _arguments(cluster, role, run_id), "selfcheck": [], "after": []}
    return {**bench, "clients": clients, "run_id": run_id, "traces": wanted(plan, role)}


def _arguments(cluster: Mapping[str, Any], role: str, run_id: str) -> List[str]:
    items = ["--role", role, "--id", run_id, "--steps", str(cluster["profile_steps"])]
    items += ["--slow-down", str(cluster["profile_slow_down"]), "--batch-timeout", str(cluster["profile_timeout"])]
    items += ["--decode-batch", str(cluster["profile_batch"])] if cluster["profile_batch"] is not None else []
    return [*items, "--activities", ",".join(cluster["profile_activities"])]
