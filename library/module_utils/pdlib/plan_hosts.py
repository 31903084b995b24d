"""What the plan says of a host: its devices, what is installed and checked there, and its firewall."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Sequence

from . import firewall, provision, runtimes, transfer
from .errors import UserError
from .fabric import Link
from .fabric_mask import Setting, Use, settings_for, shown
from .plan_site import Site
from .topology import Placed

Json = Dict[str, Any]


def entry(
    site: Site, name: str, addresses: Mapping[str, str], link: Link, settings_of_mask: Sequence[Setting], has_worker: bool
) -> Json:
    """Return the host's entry in the plan; ``settings_of_mask``: what its workers are told of its RDMA devices."""
    settings = site.inputs.hosts[name]
    needed = _needs(site, name, has_worker, link)
    return {
        "address": addresses[name],
        "gpus": list(site.gpus(name)) if name in site.worker_hosts else [],
        **_tcp_addresses(site, name, addresses[name]),
        "rdma_fabric": link.fabric,
        "rdma_devices": list(link.devices),
        "link": link.to_json(),
        "fabric": shown(link, settings_of_mask) if has_worker and not site.engine.emulated else [],
        "service_manager": settings["service_manager"],
        "service_user": settings["service_user"],
        "state_dir": settings["state_dir"],
        "install_dir": settings["install_dir"],
        "venv_python": settings["venv_python"],
        "installs": _installs(site, name, has_worker, needed),
        **({"transfer": {"system": needed.system, "efa": site.efa(name)}} if needed.system else {}),
        **(_provided(site, name) if has_worker else {}),
        "files": [str(file) for file in settings["engine_files"]] if has_worker else [],
        "cache_dir": settings["cache_dir"] if has_worker else None,
        **_walled(site, name),
    }


def fabric_of(site: Site, worker: Placed, host: str, gpus: Sequence[int], backend: str, link: Link, tcp: bool) -> List[Setting]:
    """Return what the host's RDMA mask means for one rank; an emulated engine opens no device."""
    if site.engine.emulated:
        return []
    use = Use(
        backend="none" if worker.role == "aggregated" else backend,
        gpus=gpus,
        nodes=len(worker.ranks),
        nvshmem=site.engine.nvshmem(site.engine_args(host, worker.role)),
        per_gpu=site.inputs.hosts[host]["rdma_device_per_gpu"],
        force_tcp=tcp,
        own=site.engine_env(host, worker.role),
        excluded=site.inputs.hosts[host]["rdma_devices_excluded"],
    )
    return settings_for(host, link, use)


def _needs(site: Site, host: str, has_worker: bool, link: Link) -> transfer.Needs:
    """What the host needs for its transfer engines; nothing without workers, and in an image it is the image's business."""
    settings = site.inputs.hosts[host]
    if not has_worker or site.engine.emulated:
        return transfer.Needs()
    build = settings["engine_build"]
    if build == "auto":
        build = "" if settings["engine_requirements"] else site.engine.build(site.version)
        # An engine that was here before, and runs on the CPU, was not built for CUDA.
        build = "cpu" if settings["runtime"] == "existing" and site.cpu_alone(host) else build
    found = site.inputs.discovered.get(host, {}).get("python", {})
    machine, glibc = found.get("machine", ""), found.get("glibc", "")
    about = transfer.Host(host, machine, glibc, bool(link.devices), site.efa(host), site.npu(host))
    needed = transfer.needs(about, build, site.engine.transfer_backends, site.backend, settings, settings["runtime"] == "venv")
    return transfer.Needs() if settings["runtime"] in runtimes.CONTAINERS else needed


def _installs(site: Site, host: str, has_worker: bool, needed: transfer.Needs) -> List[Json]:
    """Virtualenvs that the host needs, in the order in which they are made."""
    settings = site.inputs.hosts[host]
    rows: List[Json] = []
    if settings["service_manager"] != "systemd":
        rows.append({"name": "supervisor", "requirements": ["requirements/supervisor.txt"]})
    if host == site.router_host:
        rows.append({"name": f"{site.router.package}-{site.router.version}", "requirements": list(site.router.requirements)})
    if has_worker and site.cluster["model_source"] == "hub":
        rows.append({"name": "hub", "requirements": ["requirements/hub.txt"]})
    if has_worker and settings["runtime"] == "venv":
        wanted = settings["engine_requirements"] or site.engine.requirements(site.version)
        source = {"source": needed.source} if needed.source else {}
        if needed.source:
            rows.append({"name": needed.source["tools"], "requirements": [transfer.BUILD_TOOLS]})
        rows.append({"name": f"{site.engine.name}-{site.version}", "requirements": [*wanted, *needed.steps], **source})
    if rows:
        site.check_python(host)
    return rows


def _provided(site: Site, name: str) -> Json:
    """``runtime`` and ``model`` of a host: what is checked, or fetched, before its workers start."""
    settings = site.inputs.hosts[name]
    if site.engine.needs_model and site.cluster["model_source"] == "path":
        provision.check_model(name, site.model, site.inputs.discovered.get(name, {}).get("model"))
    about = {"engine": site.engine.name, "package": site.engine.package or site.engine.name, "version": site.version}
    about["python"] = site.python(name)
    return provision.of_host(name, settings, site.cluster, about, site.model, site.engine.needs_model, site.accelerated(name))


def _tcp_addresses(site: Site, name: str, address: str) -> Json:
    """Addresses of the host's declared ``tcp_device`` beside its own: its KV transfers come from there; {} without any."""
    device, netdevs = site.inputs.hosts[name]["tcp_device"], site.inputs.discovered.get(name, {}).get("netdevs")
    if device is None:
        return {}
    found = site.deployed(name).get("tcp_addresses") or []
    if netdevs is not None:
        found = [own for own, its in netdevs.items() if its in device.split(",") and own != address and firewall.routed(own)]
    return {"tcp_addresses": list(found)} if found else {}


def _walled(site: Site, name: str) -> Json:
    """What a host's own firewall is made of; {} where it has none."""
    settings = site.inputs.hosts[name]
    if not settings["firewall"]:
        return {}
    if settings["service_manager"] == "supervisord":
        raise UserError(
            f"host {name}: firewall: true needs root and systemd, and its services are supervisord's: "
            "set ansible_become (docs/hosts.md), or firewall: false for it"
        )
    if not site.inputs.discovered.get(name, {}).get("nft", True):
        raise UserError(f"host {name}: firewall: true needs nft, which it has not: apt-get install nftables (or its like) there")
    found = site.inputs.discovered.get(name, {}).get("port_range") or (site.deployed(name).get("firewall") or {}).get("range")
    return {"firewall": {"spared": settings["firewall_spared_ports"], "range": list(found or firewall.RANDOM_PORTS)}}
