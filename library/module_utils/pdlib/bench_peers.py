"""Another bench client after ours (``bench_tool``): what is installed for it, how it is called, which loads it can send."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Sequence

from . import keys
from .errors import UserError, listing

Json = Dict[str, Any]
#: Ours, which always runs, and those that may run after it.
OURS, PEERS = "pdbench", ("sglang", "vllm")
#: variable -> its value without which a peer cannot be asked for the same load
_UNSENDABLE = ("bench_trace", "bench_dataset", "bench_prefix_len", "bench_load")


def requirements(tool: str) -> List[str]:
    """Return the requirement files of a peer's virtualenv."""
    return [f"requirements/bench-{tool}.txt", f"no-deps:requirements/bench-{tool}-no-deps.txt"]


def installs(cluster: Mapping[str, Any]) -> List[Json]:
    """Return the virtualenv that the peer needs on the client host, none without a peer."""
    tool = cluster["bench_tool"]
    return [] if tool == OURS else [{"name": f"bench-{tool}", "requirements": requirements(tool)}]


def check(cluster: Mapping[str, Any], emulated: bool, clients: int = 1) -> None:
    """Raise UserError when the peer cannot send the load of ``bench_*`` from so many clients; ``emulated``: no model is served."""
    tool = cluster["bench_tool"]
    if tool == OURS:
        return
    said = f"bench_tool={tool}"
    if clients > 1:
        raise UserError(
            f"{said} sends from one host, and bench_clients has {clients}: leave one there, or take bench_tool=pdbench"
        )
    if cluster["router_tls_cert"]:
        raise UserError(f"{said} is not told whom to trust, and router_tls_cert is set: take bench_tool=pdbench")
    given = [name for name in _UNSENDABLE if cluster[name]]
    if given:
        raise UserError(f"{said} cannot send the load of {listing(given)}: leave it out, or take bench_tool=pdbench")
    for name in ("bench_input_len", "bench_output_len"):
        if not str(cluster[name]).isdecimal():
            raise UserError(f"{said} is given one length, and {name} is {cluster[name]}: give a number, such as 512")
    if tool == "vllm" and cluster["bench_api"] == "generate":
        raise UserError(f"{said}: vLLM's bench client does not know bench_api=generate: take completions or chat")
    arrivals = "poisson or gamma:B" if tool == "vllm" else "poisson"
    known = cluster["bench_arrival"] == "poisson" or (tool == "vllm" and cluster["bench_arrival"].startswith("gamma:"))
    if cluster["bench_request_rate"] and not known:
        raise UserError(f"{said} sends {arrivals} arrivals, and bench_arrival is {cluster['bench_arrival']}")
    if not emulated and not cluster["bench_tokenizer"]:
        raise UserError(
            f"{said} makes its prompts with the served model's tokenizer: give bench_tokenizer, its tokenizer.json or the "
            "model's folder on the controller"
        )


def command(
    where: Mapping[str, Any], plan: Mapping[str, Any], cluster: Mapping[str, Any], files: Mapping[str, str]
) -> Sequence[str]:
    """Return what goes after `pdbench run` ({dir}: the run's folder), [] without a peer; arguments as in `bench_spec.make`."""
    tool = cluster["bench_tool"]
    if tool == OURS:
        return []
    argv = [where["python"], "-m", "pdbench", "peer", "{dir}", "--tool", tool]
    argv += ["--python", f"{where['install_dir']}/bench-{tool}/bin/python"]
    argv += ["--url", plan["router"]["url"], "--model", plan["served_model_name"]]
    argv += ["--tokenizer", "{dir}/tokenizer.json"] if "tokenizer.json" in files else []
    return argv + [
        word for flag, file in keys.flags(where["state_dir"], plan["api_key"]).items() for word in (f"{flag}-file", file)
    ]
