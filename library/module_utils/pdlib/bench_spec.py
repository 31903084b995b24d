"""What one benchmark run is: where, with which command, under which name."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

from . import bench_load, bench_peers, keys
from .bench_job import MEET_KEY, ROUTER_CA
from .errors import UserError

Json = Dict[str, Any]
#: Virtualenv of the load generator on the client host.
VENV = "pdbench"
#: Seconds of load in the selfcheck before a run; starting and ending it takes as long again.
SELFCHECK_S = 2
#: Requests in flight where nothing says how many there will be.
_SOME_SLOTS = 32
#: Bytes that one request's record may take on disk, per output token and per request.
_BYTES_PER_TOKEN, _BYTES_PER_REQUEST = 64, 2000
#: Bytes of a request's body per token of the prompt.
_BYTES_PER_PROMPT_TOKEN = 6


def run_id(plan: Mapping[str, Any], label: str, now: float) -> str:
    """Return the run's folder name: time, ratio and label, sortable and safe for a file system."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-")
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    return "-".join(part for part in (stamp, plan["ratio"], words) if part)


def arguments(cluster: Mapping[str, Any], files: Mapping[str, str]) -> List[str]:
    """Return `pdbench run`'s arguments for what is sent and how it is judged; ``files``: as `bench_load.files` has them."""
    items: List[str] = ["--api", cluster["bench_api"], *bench_load.arguments(cluster, files)]
    if cluster["bench_verify_outputs"]:
        items += ["--verify-outputs", str(cluster["bench_verify_outputs"])]
    items += ["--stop-saturated"] if cluster["bench_stop_saturated"] else []
    items += ["--timeout", str(cluster["bench_timeout"])]
    for flag in ("loop-lag", "lateness"):
        items += [f"--max-{flag}-ms", str(cluster["bench_max_client_delay_ms"])]
    for flag, name in (("ttft", "bench_slo_ttft_ms"), ("tpot", "bench_slo_tpot_ms"), ("e2e", "bench_slo_e2e_ms")):
        items += [f"--slo-{flag}-ms", str(cluster[name])] if cluster[name] is not None else []
    return items


def selfcheck_arguments(cluster: Mapping[str, Any], clients: int = 1) -> List[str]:
    """Return `pdbench selfcheck`'s arguments: as many requests in flight, and answers as long, as a client will have at most.

    In an open loop that many are in flight by Little's law if answers come as fast as the selfcheck's own (50 ms, then 20 ms
    a token).
    """
    _, tokens = bench_load.tokens(cluster)
    found = bench_load.points(cluster)
    rate = max((point.rate for point in found if point.rate is not None), default=0.0)
    flying = max(
        math.ceil(rate * (0.05 + 0.02 * tokens)), *(point.concurrency or (1 if point.rate else _SOME_SLOTS) for point in found)
    )
    return ["--concurrency", str(math.ceil(flying / clients)), "--osl", str(tokens), "--seconds", str(SELFCHECK_S)]


def home(cluster: Mapping[str, Any], clients: Sequence[str], hosts: Mapping[str, Any], root: str) -> Json:
    """Return where runs are made (``clients``: by host) and where they go, whatever they measure."""
    found = {}
    for name in clients:
        settings = hosts[name]
        found[name] = {
            "state_dir": settings["state_dir"],
            "install_dir": settings["install_dir"],
            "service_user": settings["service_user"] if settings["service_manager"] == "systemd" else "",
            "wheelhouse": settings["wheelhouse"],
            "python": f"{settings['install_dir']}/{VENV}/bin/python",
        }
    return {"clients": found, "results_dir": str(Path(root) / cluster["results_dir"])}


def meet(address: str, cluster: Mapping[str, Any]) -> str:
    """Return where the first client, which has this address, listens to the others."""
    return f"[{address}]:{cluster['bench_meet_port']}" if ":" in address else f"{address}:{cluster['bench_meet_port']}"


def make(
    plan: Mapping[str, Any],
    cluster: Mapping[str, Any],
    clients: Sequence[str],
    hosts: Mapping[str, Any],
    root: str,
    now: float,
    meet: str = "",
    meet_key: str = "",
) -> Json:
    """Return the run: ``clients``, each with ``argv``, ``selfcheck`` and ``after`` ({dir} is its folder there), ``needed_mb``, and more.

    Several clients ``meet`` at an address of the first and know each other by ``meet_key``.
    """
    if not clients:
        raise UserError("bench_clients is empty: name the host that sends the load in that group of the inventory")
    bench_peers.check(cluster, bool(plan["emulated"]), len(clients))
    files = bench_load.files(cluster, root)
    prompt, answer = bench_load.tokens(cluster)
    counts = [point.requests for point in bench_load.points(cluster)]
    # Records stay, the prompts of a load point go with it.
    needed = sum(counts) * (_BYTES_PER_REQUEST + answer * _BYTES_PER_TOKEN) + max(counts) * prompt * _BYTES_PER_PROMPT_TOKEN
    where = home(cluster, clients, hosts, root)
    load = arguments(cluster, files)
    check = selfcheck_arguments(cluster, len(clients))
    for number, me in enumerate(where["clients"].values(), 1):
        argv = [me["python"], "-m", "pdbench", "run", "--url", plan["router"]["url"]]
        argv += ["--model", plan["served_model_name"], *load, "--plan", "{dir}/plan.json", "--output", "{dir}"]
        for flag, file in keys.flags(me["state_dir"], plan["api_key"], plan["admin_api_key"]).items():
            argv += [f"{flag}-file", file]
        if plan["router"].get("tls_ca"):
            argv += ["--ca-file", f"{{dir}}/{ROUTER_CA}"]
        if len(clients) > 1:
            argv += ["--share", f"{number}/{len(clients)}", "--meet", meet, "--meet-key", f"{{dir}}/{MEET_KEY}"]
        me["argv"] = argv
        me["after"] = bench_peers.command(me, plan, cluster, files)
        wanted = cluster["bench_selfcheck"]
        me["selfcheck"] = [me["python"], "-m", "pdbench", "selfcheck", *check, "--json", "{dir}/selfcheck.json"] if wanted else []
    tokenizer = ["no-deps:requirements/tokenizer.txt"] if cluster["bench_tokenizer"] else []
    return {
        **where,
        "run_id": run_id(plan, cluster["run_label"], now),
        "meet_key": meet_key,
        "files": files,
        "load": cluster["bench_load"],
        "needed_mb": cluster["bench_min_free_mb"] + needed // 1_000_000,
        "install": [
            {"name": VENV, "requirements": ["requirements/pdbench.txt", *tokenizer, "pdbench"]},
            *bench_peers.installs(cluster),
        ],
        "max_error_rate": cluster["bench_max_error_rate"],
    }
