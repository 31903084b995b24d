"""The cluster as it is declared, found and deployed: what planning asks about hosts, engine and workers."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Tuple

from . import engines, flags, keys, provision, routers, transfer
from . import ratio as ratios
from .errors import UserError
from .fabric import FABRICS, Link, link_of
from .plan_inputs import GROUPS, ROLE_GROUPS, Inputs, check_groups
from .topology import Host, Placed, RoleShape

Json = Dict[str, Any]


class Site:
    """What is known before anything is placed; only ``backend`` is set later."""

    def __init__(self, inputs: Inputs):
        self.inputs, self.cluster = inputs, inputs.cluster
        self.ratio = ratios.parse(self.cluster["ratio"])
        check_groups(inputs.groups, self.ratio)
        self.engine = engines.engine(self.cluster["engine"])
        self.version = self._engine_version()
        self.router = routers.router(self.cluster["router"])
        routers.check(self.router, self.engine, self.version, self.cluster, self.ratio.disaggregated)
        keys.check(self.cluster, self.engine.name, self.engine.admin_key)
        if self.engine.needs_model and not self.cluster["model"]:
            raise UserError(
                f"model is not set: engine {self.engine.name} needs a path or hub name, such as -e model=Qwen/Qwen2.5-3B-Instruct"
            )
        self.model = self.cluster["model"] or self.engine.name
        self.router_host = inputs.groups["router"][0]
        self.worker_hosts = list(dict.fromkeys([*inputs.groups["prefill_nodes"], *inputs.groups["decode_nodes"]]))
        self.shape = {role: self._shape(role) for role in ("prefill", "decode", "aggregated")}
        self.table = flags.load(self.engine.name, self.version)
        #: the chosen transfer backend; "" until it is
        self.backend = ""

    def _engine_version(self) -> str:
        version = self.cluster["engine_version"] or self.engine.default_version
        known = flags.versions(self.engine.name)
        if version not in known:
            raise UserError(
                f"engine_version={version!r}: {self.engine.name} is supported in {', '.join(known)}; "
                "tools/flag_table.py makes the flag table of another one"
            )
        return str(version)

    def _shape(self, role: str) -> RoleShape:
        gpus = self.cluster.get(f"{role}_tensor_parallel_size") or self.cluster["tensor_parallel_size"]
        nodes = self.cluster.get(f"{role}_nodes_per_worker") or self.cluster["nodes_per_worker"]
        if gpus % nodes:
            raise UserError(f"tensor_parallel_size={gpus} does not divide over nodes_per_worker={nodes} hosts ({role} workers)")
        return RoleShape(gpus=gpus, nodes=nodes)

    # -- hosts

    def deployed(self, name: str) -> Json:
        """Return what the deployed plan says of a host: it stands for facts of hosts that --limit leaves out."""
        current = self.inputs.current or {}
        client = ((current.get("firewall") or {}).get("bench") or {}).get(name)
        return dict(current.get("hosts", {}).get(name, {"address": client} if client else {}))

    def gpus(self, name: str) -> Tuple[int, ...]:
        """Return the indices of the host's GPUs that workers may use."""
        declared = self.inputs.hosts[name]["gpus"]
        found = self.inputs.discovered.get(name, {}).get("gpus")
        if declared is None or declared == "auto":
            found = self.deployed(name).get("gpus") if found is None else found
            if found is None:
                raise UserError(
                    f"gpus is not declared for host {name}: set a count or a list of indices in its host_vars "
                    "(`auto` is filled in by deploy_pd.yml, which contacts the host)"
                )
            return tuple(found)
        if found is not None and not set(declared) <= set(found):
            raise UserError(f"host {name}: gpus declares {list(declared)}, and the host has {list(found) or 'none'}")
        if len(set(declared)) != len(declared):
            raise UserError(f"host {name}: gpus lists an index twice: {list(declared)}")
        return tuple(declared)

    def _role_gpus(self, name: str, role: str, gpus: Tuple[int, ...]) -> Tuple[int, ...]:
        wanted = self.inputs.hosts[name].get(f"{role}_gpus")
        if wanted is None:
            return gpus
        if not set(wanted) <= set(gpus):
            raise UserError(f"host {name}: {role}_gpus={wanted} names GPUs that are not in gpus={list(gpus)}")
        return tuple(wanted)

    def host(self, name: str) -> Host:
        """Return the host as placement sees it."""
        gpus = self.gpus(name)
        roles = [role for role, groups in ROLE_GROUPS.items() if any(name in self.inputs.groups[group] for group in groups)]
        order = {
            role: min(
                list(self.inputs.groups[group]).index(name) for group in ROLE_GROUPS[role] if name in self.inputs.groups[group]
            )
            for role in roles
        }
        if "aggregated" in order:
            order["aggregated"] = self.worker_hosts.index(name)
        limit = self.inputs.limit
        return Host(
            name=name,
            gpus={role: self._role_gpus(name, role, gpus) for role in roles},
            order=order,
            shared=bool(self.inputs.hosts[name]["gpus_shared"]),
            frozen=limit is not None and name not in limit,
        )

    def address(self, name: str) -> str:
        """Return the address at which the other hosts reach one."""
        declared = self.inputs.hosts[name]["address"]
        found = self.inputs.discovered.get(name, {}).get("addresses")
        if declared is None:
            default = self.inputs.discovered.get(name, {}).get("default_address") or self.deployed(name).get("address")
            if default is None:
                raise UserError(f"address is not declared for host {name}: set the one at which the other hosts reach it")
            return str(default)
        if found is not None and declared not in found and not declared.startswith("127."):
            raise UserError(f"host {name}: address={declared} is none of the host's own ({', '.join(found)})")
        return str(declared)

    def link(self, name: str, has_worker: bool) -> Link:
        """Return the host's end of the KV path."""
        facts, needed = self.inputs.discovered.get(name, {}), has_worker and self._uses_rdma(name)
        return link_of(name, self.inputs.hosts[name], facts, self.deployed(name), self.address(name), needed)

    def _uses_rdma(self, name: str) -> bool:
        """Whether workers of a host would use its RDMA devices if it has any."""
        moves = self.ratio.disaggregated and self.cluster["transfer_backend"] not in ("mooncake_tcp", "ascend")
        return self.accelerated(name) and (moves or any(self.shape[role].nodes > 1 for role in self.ratio.counts()))

    def accelerated(self, name: str) -> bool:
        """Whether the host's workers use GPUs, so that these and RDMA devices are looked for on it; NPUs are not."""
        known = not self.engine.emulated and not self.cpu_alone(name) and not self.npu(name)
        return known and name in self.worker_hosts

    def cpu_alone(self, name: str) -> bool:
        """Whether a worker of any role would run on the host's CPU."""
        return any(self.on_cpu(name, role) for role in ("prefill", "decode", "aggregated"))

    def left_to_discover(self) -> List[str]:
        """Return the hosts of which the inventory leaves something open that deploy_pd.yml finds on the host."""
        several = len({*self.worker_hosts, self.router_host}) > 1
        walled = any(self.inputs.hosts[name]["firewall"] for name in [*self.worker_hosts, self.router_host])
        clients = self.inputs.groups["bench_clients"] if walled else ()
        auto = self.cluster["transfer_backend"] == "auto" and self.ratio.disaggregated and several
        return [
            name
            for name in dict.fromkeys([*self.worker_hosts, self.router_host, *clients])
            for host in [self.inputs.hosts[name]]
            if host["address"] is None
            or (name in self.worker_hosts and host["gpus"] in (None, "auto"))
            or (name in self.worker_hosts and auto and host["rdma_fabric"] == "auto")
            or (self._uses_rdma(name) and self._open_mask(host, several))
        ]

    def _open_mask(self, host: Mapping[str, Any], several: bool) -> bool:
        """Whether what a worker is told of its host's RDMA devices hangs on facts that the inventory does not declare."""
        devices, fabric = host["rdma_devices"], host["rdma_fabric"]
        if fabric != "none" and devices is None:
            return fabric in FABRICS or bool(host["rdma_devices_excluded"])
        backend = self.cluster["transfer_backend"]
        fabrics = {self.inputs.hosts[name]["rdma_fabric"] for name in self.worker_hosts}
        one = several and len(fabrics) == 1 and "mooncake" in self.engine.transfer_backends
        nixl = backend == "nixl" or (backend == "auto" and self.ratio.disaggregated and not one)
        return bool(devices) and fabric != "none" and host["tcp_device"] is None and nixl

    def efa(self, host: str) -> bool:
        """Whether Mooncake on a host goes over AWS's EFA: said so, or found where there is no other card."""
        said = self.inputs.hosts[host]["mooncake_protocol"]
        if said is not None:
            return bool(said == "efa")
        cards = self.inputs.discovered.get(host, {}).get("rdma")
        if cards is None:
            return bool(self.deployed(host).get("transfer", {}).get("efa"))
        return transfer.has_efa(cards)

    def npu(self, host: str) -> bool:
        """Whether the devices of a host's workers are Ascend's."""
        own = self.inputs.hosts[host]
        word = str((own["engine_env"] or {}).get("ENABLE_ASCEND_TRANSFER_WITH_MOONCAKE", "")).lower()
        mooncake = own["ascend_transfer_with_mooncake"] or word in ("1", "true", "yes", "y")
        return self.cluster["transfer_backend"] == "ascend" or bool(mooncake)

    def inventory_order(self, name: str) -> int:
        """Return the host's place in the inventory, by which hosts are sorted."""
        everyone = list(dict.fromkeys(host for group in GROUPS for host in self.inputs.groups[group]))
        return everyone.index(name) if name in everyone else len(everyone)

    # -- workers

    def running(self) -> List[Placed]:
        """Return the workers of the deployed plan."""
        plan = self.inputs.current
        if not plan:
            return []
        return [
            Placed(w["name"], w["role"], tuple((rank["host"], tuple(rank["gpus"])) for rank in w["ranks"]))
            for w in plan["workers"]
        ]

    def kept(self, name: str) -> Optional[Json]:
        """Return a worker of the deployed plan as it stands there."""
        for worker in (self.inputs.current or {}).get("workers", []):
            if worker["name"] == name:
                return dict(worker)
        return None

    def meeting(self, name: str) -> Json:
        """Return ``meeting`` of a worker: how often its ranks had to start together again because one was started, or ended, alone.

        Ranks meet once, at their start. Of ranks on hosts that --limit leaves out nothing is known.
        """
        kept = self.kept(name) or {"ranks": []}
        units = [self.inputs.discovered.get(rank["host"], {}).get("units") for rank in kept["ranks"]]
        became = {(found or {}).get(rank["unit"][: -len(".service")], "ended") for found, rank in zip(units, kept["ranks"])}
        count = kept.get("meeting", 0) + (None not in units and len(became) > 1)
        return {"meeting": count} if count else {}

    def engine_args(self, host: str, role: str) -> Json:
        """Return the user's flags for one rank: general ones, overlaid by the role's; the name of a shipped file is its path."""
        settings, result = self.inputs.hosts[host], {}
        shipped = {file.rpartition("/")[2]: f"{settings['state_dir']}/files" for file in map(str, settings["engine_files"])}
        for name in ("engine_args", f"{role}_engine_args"):
            where = f"{name} (host {host})"
            result.update(flags.canonical(self.table, settings.get(name) or {}, where, self.engine.owned))
        return {name: f"{shipped[value]}/{value}" if str(value) in shipped else value for name, value in result.items()}

    def engine_env(self, host: str, role: str) -> Dict[str, str]:
        """Return the user's environment for one rank: the transfer engine's variables, the general one, overlaid by the role's."""
        result = transfer.environment(self.inputs.hosts[host], self.engine.name, role, self.backend)
        if self.backend == "mooncake" and role != "aggregated" and self.efa(host):
            result["MOONCAKE_PROTOCOL"] = "efa"
        for name in ("engine_env", f"{role}_engine_env"):
            result.update({key: str(value) for key, value in (self.inputs.hosts[host].get(name) or {}).items()})
        return result

    @property
    def hub_token(self) -> bool:
        """Whether workers get the hub's token: there is one, and the engine downloads the model by its name."""
        by_name = self.engine.needs_model and self.cluster["model_source"] == "path" and not self.model.startswith("/")
        return by_name and self.cluster["hf_token"] is not None

    def on_cpu(self, host: str, role: str) -> bool:
        """Whether a worker of the role runs on the host's CPU."""
        return self.engine.on_cpu(self.engine_args(host, role), self.engine_env(host, role))

    def may_switch(self, worker: Placed) -> bool:
        """Whether the engine may change the worker's role while it runs; it then listens for bootstraps whatever its role is."""
        if worker.role == "aggregated" or len(worker.ranks) > 1 or not self.engine.switch_flag:
            return False
        return self.engine_args(worker.ranks[0][0], worker.role).get(self.engine.switch_flag) is True

    def python(self, host: str) -> str:
        """Return the Python that the host's engine runs in."""
        settings = self.inputs.hosts[host]
        return provision.engine_python(host, settings, f"{settings['install_dir']}/{self.engine.name}-{self.version}")

    def check_python(self, host: str) -> None:
        """Refuse a host whose Python, as far as it is known, virtualenvs of ours cannot be made with."""
        found = self.inputs.discovered.get(host, {}).get("python")
        if found:
            provision.check_python(host, found)
