"""What one benchmark run is: where, with which command, under which name."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

from .errors import UserError
from .units import KEY_FILE

Json = Dict[str, Any]
#: Virtualenv of the load generator on the client host.
VENV = "pdbench"
#: Bytes that one request's record may take on disk, per output token and per request.
_BYTES_PER_TOKEN, _BYTES_PER_REQUEST = 64, 2000


def run_id(plan: Mapping[str, Any], label: str, now: float) -> str:
    """Return the run's folder name: time, ratio and label, sortable and safe for a file system."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-")
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    return "-".join(part for part in (stamp, plan["ratio"], words) if part)


def _longest(span: str) -> int:
    return int(span.split("-")[-1])


def load_arguments(cluster: Mapping[str, Any], trace: str) -> List[str]:
    """Return `pdbench run`'s arguments for the load; ``trace``: the trace file's path on the client, "" without one."""
    items: List[str] = ["--api", cluster["bench_api"], "--num-requests", str(cluster["bench_num_requests"])]
    if cluster["bench_request_rate"]:
        rates = ",".join(str(rate) for rate in cluster["bench_request_rate"])
        items += ["--request-rate", rates, "--arrival", cluster["bench_arrival"]]
    else:
        items += ["--concurrency", ",".join(str(number) for number in cluster["bench_concurrency"])]
    if trace:
        items += ["--trace", trace, "--length-scale", str(cluster["bench_length_scale"])]
        for flag, name in (("--max-isl", "bench_max_input_len"), ("--max-osl", "bench_max_output_len")):
            items += [flag, str(cluster[name])] if cluster[name] else []
    else:
        items += ["--isl", cluster["bench_input_len"], "--osl", cluster["bench_output_len"]]
    if cluster["bench_warmup"] is not None:
        items += ["--warmup", str(cluster["bench_warmup"])]
    if cluster["bench_verify_outputs"]:
        items += ["--verify-outputs", str(cluster["bench_verify_outputs"])]
    items += ["--seed", str(cluster["bench_seed"]), "--timeout", str(cluster["bench_timeout"])]
    for flag, name in (("ttft", "bench_slo_ttft_ms"), ("tpot", "bench_slo_tpot_ms"), ("e2e", "bench_slo_e2e_ms")):
        items += [f"--slo-{flag}-ms", str(cluster[name])] if cluster[name] is not None else []
    return items


def client(cluster: Mapping[str, Any], name: str, hosts: Mapping[str, Any], root: str) -> Json:
    """Return where runs are made and where they go, whatever they measure."""
    settings = hosts[name]
    return {
        "client": name,
        "state_dir": settings["state_dir"],
        "install_dir": settings["install_dir"],
        "service_user": settings["service_user"] if settings["service_manager"] == "systemd" else "",
        "wheelhouse": settings["wheelhouse"],
        "python": f"{settings['install_dir']}/{VENV}/bin/python",
        "results_dir": str(Path(root) / cluster["results_dir"]),
    }


def make(
    plan: Mapping[str, Any],
    cluster: Mapping[str, Any],
    clients: Sequence[str],
    hosts: Mapping[str, Any],
    root: str,
    now: float,
) -> Json:
    """Return the run: ``client``, ``argv`` ({dir} stands for its folder there), ``needed_mb``, ``install`` and more."""
    if not clients:
        raise UserError("bench_clients is empty: name the host that sends the load in that group of the inventory")
    where = client(cluster, clients[0], hosts, root)
    for rate in cluster["bench_request_rate"] or []:
        try:
            good = 0 < float(rate) < math.inf
        except (TypeError, ValueError):
            good = False
        if not good:
            raise UserError(f"bench_request_rate={rate!r}: expected numbers above 0, such as 4 or 4,8,16 (requests a second)")
    trace = cluster["bench_trace"] or ""
    if trace:
        path = Path(trace) if Path(trace).is_absolute() else Path(root) / trace
        if not path.is_file():
            raise UserError(f"bench_trace={trace}: there is no such file on the controller")
        trace = str(path)
    points = len(cluster["bench_request_rate"] or cluster["bench_concurrency"])
    tokens = cluster["bench_max_output_len"] or (1000 if trace else _longest(cluster["bench_output_len"]))
    needed = points * cluster["bench_num_requests"] * (_BYTES_PER_REQUEST + tokens * _BYTES_PER_TOKEN)
    argv = [where["python"], "-m", "pdbench", "run", "--url", plan["router"]["url"]]
    argv += ["--model", plan["served_model_name"], *load_arguments(cluster, "{dir}/trace.jsonl" if trace else "")]
    argv += ["--plan", "{dir}/plan.json", "--output", "{dir}"]
    if plan["api_key"]:
        argv += ["--api-key-file", f"{where['state_dir']}/{KEY_FILE}"]
    return {
        **where,
        "run_id": run_id(plan, cluster["run_label"], now),
        "argv": argv,
        "trace": trace,
        "needed_mb": cluster["bench_min_free_mb"] + needed // 1_000_000,
        "install": [{"name": VENV, "requirements": ["requirements/pdbench.txt", "pdbench"]}],
        "max_error_rate": cluster["bench_max_error_rate"],
    }
