"""What the plan says of processes: the ranks of workers, and the router."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Sequence

from . import engines, flags, keys, plan_ports, provision, routers, runtimes, transfer
from .fabric import Link
from .fabric_mask import Setting
from .plan_site import Site
from .topology import Placed

Json = Dict[str, Any]


def rank_of(
    site: Site,
    worker: Placed,
    index: int,
    ports: Mapping[str, int],
    backend: str,
    addresses: Mapping[str, str],
    links: Mapping[str, Link],
    fabric: Sequence[Setting],
) -> Json:
    """Return one rank of a worker; ``ports``: the worker's own; ``fabric``: what the host's RDMA mask means for it."""
    host, gpus = worker.ranks[index]
    settings = site.inputs.hosts[host]
    listen = settings["listen_address"] or addresses[host]
    in_container = settings["runtime"] in runtimes.CONTAINERS
    context = engines.WorkerContext(
        role=worker.role, python=site.python(host), state_dir=settings["state_dir"],
        model=provision.model_on(settings, site.cluster, site.model),
        served_model_name=site.cluster["served_model_name"] or site.model, listen=listen, port=ports["port"],
        bootstrap_port=ports.get("bootstrap_port"), side_channel_port=ports.get("side_channel_port"),
        tensor_parallel_size=site.shape[worker.role].gpus, nodes=len(worker.ranks), node_rank=index,
        dist_init=f"{addresses[worker.ranks[0][0]]}:{ports.get('dist_init_port', 0)}", transfer_backend=backend,
        node=host, rdma_fabric=links[host].fabric if links[host].devices else "none",
        fabric=fabric, gpus=runtimes.visible(gpus, site.gpus(host)) if in_container else gpus,
        mem_fraction=settings["mem_fraction"], profile=settings["emulated_profile"],
        api_key=site.cluster["api_key"] is not None, admin_api_key=site.cluster["admin_api_key"] is not None,
        address=addresses[host], cache_dir=settings["cache_dir"], npu=site.npu(host),
    )  # fmt: skip
    given = flags.overlaid(site.engine.flags(context), site.engine_args(host, worker.role))
    own = site.engine_env(host, worker.role)
    hub = keys.hub_env(settings["state_dir"]) if site.hub_token else {}
    env = {**site.engine.env(context), **hub, **transfer.npu_environment(own, host, worker.name, gpus), **own}
    rank = {
        "host": host, "node_rank": index, "gpus": list(gpus), "unit": f"pd-{worker.name}.service",
        "argv": [*site.engine.command(context), *flags.argv(given)], "env": env, "address": addresses[host],
        "listen": listen, **ports, "rdma_devices": list(links[host].devices),
    }  # fmt: skip
    channels = len(plan_ports.taken_from(site, worker, "side_channel_port", 0)) if "side_channel_port" in ports else 1
    rank.update({"side_channels": channels} if channels > 1 else {})
    if site.may_switch(worker) and backend in site.engine.switch_backends and not in_container:
        # A unit that is called by its port, for its role may become another one.
        rank["unit"] = f"pd-worker-{ports['port']}.service"
        rank["switch"] = {"flag": f"--{site.engine.role_flag}", "role": worker.role}
    if in_container:
        model = context.model if site.engine.needs_model else ""
        rank["container"] = provision.container(rank, settings, site.cluster, model, site.gpus(host), site.accelerated(host))
    if index == 0:
        rank["health_url"] = f"http://{addresses[host]}:{ports['port']}{site.engine.health_path(site.version)}"
    return rank


def router_of(site: Site, workers: Sequence[Json], addresses: Mapping[str, str]) -> Json:
    """Return the router, which has ``workers`` (entries of the plan) as members."""
    host, settings, cluster = site.router_host, site.inputs.hosts[site.router_host], site.cluster
    listen = settings["listen_address"] or addresses[host]
    context = routers.RouterContext(
        python=f"{settings['install_dir']}/{site.router.package}-{site.router.version}/bin/python",
        state_dir=settings["state_dir"], listen=listen, port=cluster["router_port"],
        prometheus_port=cluster["router_prometheus_port"], policy=cluster["router_policy"],
        prefill_policy=cluster["router_prefill_policy"], decode_policy=cluster["router_decode_policy"],
        check_interval=cluster["router_health_check_interval"], ready_timeout=cluster["ready_timeout"],
        disaggregated=site.ratio.disaggregated, engine=site.engine.name,
        workers=[(w["role"], w["url"], w["ranks"][0].get("bootstrap_port")) for w in workers],
        api_key=cluster["api_key"] is not None, tls=bool(cluster["router_tls_cert"]),
    )  # fmt: skip
    extra = site.router.arguments(cluster["router_args"])
    scheme = "https" if cluster["router_tls_cert"] else "http"
    registration = site.router.registers(site.engine.name, site.ratio.disaggregated)
    members = [] if registration else site.router.members(context)
    return {
        "name": site.router.name, "version": site.router.version, "host": host, "unit": "pd-router.service",
        "argv": [*site.router.command(context), *flags.argv({**site.router.flags(context), **extra}), *members],
        # Where members cannot change while it runs, they are what it is restarted for.
        "members": members if site.router.membership == "workers" else [], "membership": site.router.membership,
        "registration": registration, "env": {}, "address": addresses[host], "listen": listen, "port": cluster["router_port"],
        "prometheus_port": cluster["router_prometheus_port"], "url": f"{scheme}://{addresses[host]}:{cluster['router_port']}",
        "metrics_url": f"http://{addresses[host]}:{cluster['router_prometheus_port']}/metrics",
        **({"tls_ca": site.inputs.tls_ca} if cluster["router_tls_cert"] else {}),
    }  # fmt: skip
