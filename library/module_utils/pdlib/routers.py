"""What is particular to each router: command lines, policies, members. No other file names one in an `if`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from . import flags as tables
from . import keys
from .engines import Engine, run_module
from .errors import UserError, did_you_mean


@dataclass(frozen=True)
class RouterContext:
    """What a router's command line is made of; ``workers``: (role, url, bootstrap port) in plan order; times in seconds."""

    python: str
    state_dir: str
    listen: str
    port: int
    prometheus_port: int
    policy: str
    prefill_policy: Optional[str]
    decode_policy: Optional[str]
    check_interval: int
    ready_timeout: int
    disaggregated: bool
    workers: Sequence[Tuple[str, str, Optional[int]]]
    api_key: bool
    tls: bool
    engine: str


@dataclass(frozen=True)
class Router:
    """The facts of one router.

    ``engines``: what it can route for. ``policies``: of all roles; ``prefill_policies``: besides these. ``polls``: policy ->
    the path of a worker that it cannot do without. ``membership``: "workers" where members change by POST and DELETE /workers,
    else "restart". ``registration``: engine -> what its workers must be registered with, so that they are no part of the
    command line.
    """

    name: str
    package: str
    version: str
    requirements: Tuple[str, ...]
    engines: Tuple[str, ...]
    policies: Tuple[str, ...]
    module: str
    flags: Callable[[RouterContext], Dict[str, Any]]
    owned: Mapping[str, str]
    #: command-line items that name the workers
    members: Callable[[RouterContext], List[str]]
    prefill_policies: Tuple[str, ...] = ()
    polls: Mapping[str, str] = field(default_factory=dict)
    membership: str = "workers"
    registration: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    #: whether it can stand before aggregated workers
    aggregated: bool = True
    #: whether it asks clients for the key, and gives it to workers
    takes_key: bool = True
    #: whether it speaks HTTPS
    tls: bool = True

    def command(self, c: RouterContext) -> List[str]:
        """Return argv before the flags."""
        return run_module(self.module, c.python, c.state_dir, c.api_key)

    def registers(self, engine: str, disaggregated: bool) -> Dict[str, str]:
        """Return what the workers are registered with, {} where the command line says all."""
        return dict(self.registration.get(engine, {})) if disaggregated else {}

    def arguments(self, given: Mapping[str, Any]) -> Dict[str, Any]:
        """Return the user's ``router_args`` in the router's own spelling; raise UserError for what it has not."""
        return tables.canonical(tables.load_router(self.package, self.version), given, "router_args", self.owned)


def _common_flags(c: RouterContext) -> Dict[str, Any]:
    flags: Dict[str, Any] = {"host": c.listen, "port": c.port}
    if c.tls:
        named = {"tls-cert-path": keys.CERT, "tls-key-path": keys.CERT_KEY}
        flags.update({flag: f"{c.state_dir}/{keys.FILES[name]}" for flag, name in named.items()})
    flags.update({"prometheus-host": c.listen, "prometheus-port": c.prometheus_port, "policy": c.policy})
    return flags


def _role_policies(c: RouterContext) -> Dict[str, Any]:
    given = {"prefill-policy": c.prefill_policy, "decode-policy": c.decode_policy}
    return {name: policy for name, policy in given.items() if policy}


def _health_flags(c: RouterContext) -> Dict[str, Any]:
    # The defaults (30 s, 60 s) leave a deployment waiting for half a minute and a dead worker in use for three.
    return {"worker-startup-check-interval": 1, "health-check-interval-secs": c.check_interval}


def _sglang_flags(c: RouterContext) -> Dict[str, Any]:
    pd: Dict[str, Any] = {"pd-disaggregation": True, **_role_policies(c)} if c.disaggregated else {}
    return {**_common_flags(c), **pd, **_health_flags(c)}


def _mini_lb_flags(c: RouterContext) -> Dict[str, Any]:
    return {"host": c.listen, "port": c.port, "policy": c.policy, "pd-disaggregation": True, "mini-lb": True}


def _vllm_flags(c: RouterContext) -> Dict[str, Any]:
    pd: Dict[str, Any] = {"vllm-pd-disaggregation": True, "kv-connector": "nixl", **_role_policies(c)} if c.disaggregated else {}
    # It listens once all workers are healthy, and gives up when they are not by then.
    return {**_common_flags(c), **pd, **_health_flags(c), "worker-startup-timeout-secs": c.ready_timeout}


def _members(c: RouterContext) -> List[str]:
    return member_items(c.workers)


def member_items(workers: Sequence[Tuple[str, str, Optional[int]]]) -> List[str]:
    """Return command-line items that name workers, given as (role, url, bootstrap port)."""
    items: List[str] = []
    for role, url, bootstrap_port in workers:
        if role == "prefill":
            items += ["--prefill", url] + ([str(bootstrap_port)] if bootstrap_port is not None else [])
        elif role == "decode":
            items += ["--decode", url]
    aggregated = [url for role, url, _ in workers if role == "aggregated"]
    return items + (["--worker-urls", *aggregated] if aggregated else [])


_OWNED = {
    "host": "listen_address",
    "port": "router_port",
    "prometheus-host": "listen_address",
    "prometheus-port": "router_prometheus_port",
    "policy": "router_policy",
    "prefill-policy": "router_prefill_policy",
    "decode-policy": "router_decode_policy",
    "pd-disaggregation": "ratio",
    "vllm-pd-disaggregation": "ratio",
    "prefill": "ratio",
    "decode": "ratio",
    "worker-urls": "ratio",
    "api-key": "api_key",
    "tls-cert-path": "router_tls_cert",
    "tls-key-path": "router_tls_key",
    "health-check-interval-secs": "router_health_check_interval",
    "mini-lb": "router (to mini-lb)",
}
_SGLANG_ROUTER = "requirements/router-sglang-router.txt"

ROUTERS: Dict[str, Router] = {
    "sglang-router": Router(
        name="sglang-router",
        package="sglang-router",
        version="0.3.2",
        requirements=(_SGLANG_ROUTER,),
        # It sends both ends the same body with bootstrap fields: vLLM's two steps are not in it.
        engines=("sglang", "emulated"),
        policies=("random", "round_robin", "cache_aware", "power_of_two", "manual"),
        prefill_policies=("bucket",),
        polls={"power_of_two": "/get_load"},
        module="sglang_router.launch_router",
        flags=_sglang_flags,
        members=_members,
        owned=_OWNED,
    ),
    "smg": Router(
        name="smg",
        package="smg",
        version="1.13.0",
        requirements=("requirements/router-smg.txt",),
        engines=("sglang", "emulated", "vllm"),
        policies=(
            *("random", "round_robin", "passthrough", "cache_aware", "power_of_two", "least_load", "manual"),
            *("consistent_hashing", "prefix_hash"),
        ),
        prefill_policies=("bucket",),
        module="smg.launch_router",
        flags=_sglang_flags,
        members=_members,
        owned=_OWNED,
        # Workers of its command line get no kv_transfer_params: decode computes every prompt itself, with HTTP 200.
        registration={"vllm": {"runtime_type": "vllm", "kv_connector": "NixlConnector", "kv_role": "kv_both"}},
    ),
    "vllm-router": Router(
        name="vllm-router",
        package="vllm-router",
        version="0.1.17",
        requirements=("requirements/router-vllm-router.txt",),
        engines=("vllm",),
        policies=("random", "round_robin", "cache_aware", "power_of_two", "consistent_hash", "sticky_least_loaded"),
        polls={"power_of_two": "/get_load"},
        module="vllm_router.launch_router",
        flags=_vllm_flags,
        members=_members,
        owned={**_OWNED, "kv-connector": "transfer_backend", "worker-startup-timeout-secs": "ready_timeout"},
        # POST /workers: "PD router requires specific add_prefill_server or add_decode_server methods"
        membership="restart",
        # With --api-key it sends "Bearer " and nothing else, and lets every client in.
        takes_key=False,
        tls=False,
    ),
    "mini-lb": Router(
        name="mini-lb",
        package="sglang-router",
        version="0.3.2",
        requirements=(_SGLANG_ROUTER,),
        engines=("sglang", "emulated"),
        policies=("random",),
        module="sglang_router.launch_router",
        flags=_mini_lb_flags,
        members=_members,
        owned=_OWNED,
        membership="restart",
        aggregated=False,
        takes_key=False,
        tls=False,
    ),
}


def router(name: str) -> Router:
    """Return a router's facts; raise UserError for one we do not have."""
    if name not in ROUTERS:
        raise UserError(f"router={name!r}: one of {', '.join(ROUTERS)}{did_you_mean(name, ROUTERS)}")
    return ROUTERS[name]


def _check_tls(chosen: Router, cluster: Mapping[str, Any]) -> None:
    cert, key = cluster[keys.CERT], cluster[keys.CERT_KEY]
    if cert and not chosen.tls:
        able = [other.name for other in ROUTERS.values() if other.tls]
        raise UserError(f"router={chosen.name} speaks no TLS: set router to {' or '.join(able)}, or no router_tls_cert")
    for name in (keys.CERT_KEY, "router_tls_ca"):
        if cluster[name] and not cert:
            raise UserError(f"{name} is set, and router_tls_cert is not: the router needs a certificate to speak TLS")
    if cert and not key:
        raise UserError("router_tls_cert is set, and router_tls_key is not: the router needs the certificate's private key")


def _numbers(version: str) -> List[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def check(chosen: Router, engine: Engine, version: str, cluster: Mapping[str, Any], disaggregated: bool) -> None:
    """Refuse, before any contact, a router that cannot do what is asked of it; ``version``: the engine's.

    Raises UserError naming the variables and what would do.
    """
    if engine.name not in chosen.engines:
        able = [other.name for other in ROUTERS.values() if engine.name in other.engines]
        raise UserError(f"router={chosen.name} cannot route for engine {engine.name}: set router to {' or '.join(able)}")
    if not disaggregated and not chosen.aggregated:
        raise UserError(
            f"router={chosen.name} is for prefill and decode workers alone: take another one for ratio={cluster['ratio']}"
        )
    if cluster["api_key"] is not None and not chosen.takes_key:
        raise UserError(f"router={chosen.name} sends workers no api_key: set another router, or no api_key")
    _check_tls(chosen, cluster)
    for role in ("", "prefill_", "decode_"):
        name, policy = f"router_{role}policy", cluster[f"router_{role}policy"]
        able_to = [*chosen.policies, *(chosen.prefill_policies if role == "prefill_" else ())]
        if policy is not None and policy not in able_to:
            others = [r.name for r in ROUTERS.values() if policy in r.policies and engine.name in r.engines]
            also = f"; {' and '.join(others)} has it" if others else did_you_mean(policy, able_to)
            raise UserError(f"{name}={policy!r}: {chosen.name} {chosen.version} has {', '.join(able_to)}{also}")
        polled = chosen.polls.get(policy or "", "")
        gone = engine.gone.get(polled)
        if gone and _numbers(version) >= _numbers(gone):
            raise UserError(
                f"{name}={policy}: {chosen.name} {chosen.version} asks workers for {polled}, which {engine.name} {version} does not "
                f"have: set router=smg (its least_load and {policy} ask for what there is), or another policy"
            )
