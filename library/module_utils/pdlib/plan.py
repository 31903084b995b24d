"""The plan: the one description of what runs where, made from inventory, ratio and what runs today. Pure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Sequence, Set, Tuple

from . import engines, firewall, flags, keys, plan_file, provision, routers, runtimes, transfer
from . import ratio as ratios
from .errors import UserError, listing
from .fabric import FABRICS, Link, Setting, Use, choose_backend, expected_transport, forces_tcp, link_of, settings_for, shown
from .topology import Host, Placed, RoleShape, attempt, fullest_ratios, place

GROUPS = ("prefill_nodes", "decode_nodes", "router", "bench_clients")
ROLE_GROUPS = {"prefill": ("prefill_nodes",), "decode": ("decode_nodes",), "aggregated": ("prefill_nodes", "decode_nodes")}
#: Workers keep their ports while these lie within this many of the base.
_PORT_SPAN = 1000
#: kind of port -> the variable that has the first of them
_BASES = {"port": "worker_port_base", "bootstrap_port": "bootstrap_port_base", "side_channel_port": "side_channel_port_base"}

Json = Dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """All that a plan is made from.

    ``groups``: group -> hosts in inventory order; ``cluster`` and ``hosts``: typed settings (settings.py); ``limit``: the
    hosts of ``--limit``, None without one; ``current``: the deployed plan; ``discovered``: host -> facts found there;
    ``overrides``: the extra-vars that the deployment is made with (no secrets); ``tls_ca``: what clients of the router trust.
    """

    groups: Mapping[str, Sequence[str]]
    cluster: Mapping[str, Any]
    hosts: Mapping[str, Mapping[str, Any]]
    limit: Optional[FrozenSet[str]] = None
    current: Optional[Json] = None
    discovered: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    tls_ca: str = ""


def check_groups(groups: Mapping[str, Sequence[str]], ratio: ratios.Ratio) -> None:
    """Refuse groups in which the ratio cannot find its hosts."""
    check_group_names(groups)
    if len(groups["router"]) != 1:
        raise UserError(f"the group router has {len(groups['router'])} hosts ({listing(groups['router'])}): it takes exactly one")
    for role in ratio.counts():
        if not any(groups[group] for group in ROLE_GROUPS[role]):
            raise UserError(f"ratio {ratio} needs hosts in {' or '.join(ROLE_GROUPS[role])}, and there is none")


class Planner:
    """Makes one plan; :func:`make_plan` is the way in."""

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

    def _deployed(self, name: str) -> Json:
        """What the deployed plan says of a host: it stands for facts of hosts that --limit leaves out."""
        current = self.inputs.current or {}
        client = ((current.get("firewall") or {}).get("bench") or {}).get(name)
        return dict(current.get("hosts", {}).get(name, {"address": client} if client else {}))

    def _gpus(self, name: str) -> Tuple[int, ...]:
        declared = self.inputs.hosts[name]["gpus"]
        found = self.inputs.discovered.get(name, {}).get("gpus")
        if declared is None or declared == "auto":
            found = self._deployed(name).get("gpus") if found is None else found
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

    def _host(self, name: str) -> Host:
        gpus = self._gpus(name)
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
            default = self.inputs.discovered.get(name, {}).get("default_address") or self._deployed(name).get("address")
            if default is None:
                raise UserError(f"address is not declared for host {name}: set the one at which the other hosts reach it")
            return str(default)
        if found is not None and declared not in found and not declared.startswith("127."):
            raise UserError(f"host {name}: address={declared} is none of the host's own ({', '.join(found)})")
        return str(declared)

    def _link(self, name: str, has_worker: bool) -> Link:
        facts, needed = self.inputs.discovered.get(name, {}), has_worker and self._uses_rdma(name)
        return link_of(name, self.inputs.hosts[name], facts, self._deployed(name), self.address(name), needed)

    def _uses_rdma(self, name: str) -> bool:
        """Whether workers of a host would use its RDMA devices if it has any."""
        moves = self.ratio.disaggregated and self.cluster["transfer_backend"] not in ("mooncake_tcp", "ascend")
        return self.accelerated(name) and (moves or any(self.shape[role].nodes > 1 for role in self.ratio.counts()))

    def accelerated(self, name: str) -> bool:
        """Whether the host's workers use GPUs, so that these and RDMA devices are looked for on it; NPUs are not."""
        known = not self.engine.emulated and not self._cpu_alone(name) and not self._npu(name)
        return known and name in self.worker_hosts

    def _cpu_alone(self, name: str) -> bool:
        return any(self._on_cpu(name, role) for role in ("prefill", "decode", "aggregated"))

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

    def check_flags(self) -> None:
        """Refuse wrong flags of the router and of any worker host, before placement says which hosts are used."""
        self.router.arguments(self.cluster["router_args"])
        for name in self.worker_hosts:
            transfer.check(name, self.engine.name, self.inputs.hosts[name])
            for role in self.ratio.counts():
                self._engine_args(name, role)

    def ratios(self) -> List[ratios.Ratio]:
        """Return the ratios that use the inventory's GPUs as far as they go, and aggregated workers on as many."""
        shared = [name for name in self.worker_hosts if self.inputs.hosts[name]["gpus_shared"]]
        if shared:
            raise UserError(
                f"host {shared[0]}: gpus_shared is set: how workers that share a GPU slow each other down is not known"
            )
        return fullest_ratios(self.shape, [self._host(name) for name in self.worker_hosts])

    def check_fits(self) -> None:
        """Refuse a ratio that the hosts have no room for."""
        self._placement()

    # -- placement

    def _current(self) -> List[Placed]:
        plan = self.inputs.current
        if not plan:
            return []
        return [
            Placed(w["name"], w["role"], tuple((rank["host"], tuple(rank["gpus"])) for rank in w["ranks"]))
            for w in plan["workers"]
        ]

    def check_departed(self) -> None:
        """Refuse to go on when hosts with workers, or the router's host, are no longer where the deployment has them."""
        current = self.inputs.current
        if not current:
            return
        gone = {rank["host"]: worker["name"] for worker in current["workers"] for rank in worker["ranks"]}
        gone = {host: name for host, name in gone.items() if host not in self.inputs.hosts}
        if gone:
            raise UserError(
                f"{listing(gone)} left the inventory and still runs {listing(gone.values())}: "
                f"put it back, type ansible-playbook teardown.yml -l {','.join(gone)}, and then take it out"
            )
        before = current["router"]["host"]
        if before != self.router_host:
            raise UserError(
                f"the router of the deployment is on {before}, and the inventory now has it on {self.router_host}: "
                "teardown.yml with the old inventory first"
            )

    def check_frozen(self, workers: Sequence[Json]) -> None:
        """Refuse a limit that leaves out hosts whose workers would have to change."""
        limit = self.inputs.limit
        if limit is None:
            return
        for worker in workers:
            outside = [rank["host"] for rank in worker["ranks"] if rank["host"] not in limit]
            kept = self._kept(worker["name"])
            if outside and kept is not None and kept["ranks"] != worker["ranks"]:
                typed = ",".join(sorted({*limit, *outside}, key=self._inventory_order))
                raise UserError(
                    f"--limit leaves out {listing(dict.fromkeys(outside))}, and {worker['name']} there would change: type -l {typed}"
                )

    def _placement(self) -> List[Placed]:
        hosts, current = [self._host(name) for name in self.worker_hosts], self._current()
        limit = self.inputs.limit
        found = attempt(self.ratio, self.shape, hosts, current)
        if found is None and limit is not None:
            thawed = [Host(h.name, h.gpus, h.order, h.shared) for h in hosts]
            open_plan = attempt(self.ratio, self.shape, thawed, current)
            if open_plan is not None:
                needed = {host for worker in open_plan for host, _ in worker.ranks}
                needed |= {host for worker in current if worker not in open_plan for host, _ in worker.ranks}
                missing = sorted((needed & {h.name for h in hosts}) - limit, key=self.worker_hosts.index)
                raise UserError(
                    f"ratio {self.ratio} does not fit the hosts of --limit: it needs {listing(missing)}, too; "
                    f"type -l {','.join([*sorted(limit, key=self._inventory_order), *missing])}"
                )
        return found if found is not None else place(self.ratio, self.shape, hosts, current)

    def _inventory_order(self, name: str) -> int:
        everyone = list(dict.fromkeys(host for group in GROUPS for host in self.inputs.groups[group]))
        return everyone.index(name) if name in everyone else len(everyone)

    def check_limit(self, also: Sequence[str] = ()) -> None:
        """Refuse a ``--limit`` that leaves out the router (or a host of ``also``), naming it and what to type."""
        limit = self.inputs.limit
        for host, what in [(self.router_host, "the router"), *((name, "the bench client") for name in also)]:
            if limit is not None and host not in limit:
                typed = ",".join(sorted({*limit, host}, key=self._inventory_order))
                raise UserError(f"--limit leaves out {host}, {what}: type -l {typed}")

    # -- ports

    def _kept(self, name: str) -> Optional[Json]:
        for worker in (self.inputs.current or {}).get("workers", []):
            if worker["name"] == name:
                return dict(worker)
        return None

    def _ports(self, placed: Sequence[Placed], addresses: Mapping[str, str]) -> Dict[str, Dict[str, int]]:
        """Worker -> its ports by kind; sticky, and never one twice on an address."""
        used: Dict[str, Set[int]] = {}
        router = used.setdefault(addresses[self.router_host], set())
        router |= {self.cluster["router_port"], self.cluster["router_prometheus_port"]}
        result: Dict[str, Dict[str, int]] = {worker.name: {} for worker in placed}
        wanted: List[Tuple[Placed, str, int]] = []
        for worker in placed:
            kinds = {kind: self.cluster[f"{_BASES[kind]}"] for kind in ("port", *self.engine.ports.get(worker.role, ()))}
            kinds["port"] = self.cluster.get(f"{worker.role}_worker_port_base") or kinds["port"]
            if self._may_switch(worker):
                kinds["bootstrap_port"] = self.cluster["bootstrap_port_base"]
            if len(worker.ranks) > 1:
                kinds["dist_init_port"] = self.cluster["dist_init_port_base"]
            kept = self._before(worker, placed)
            taken = [used.setdefault(addresses[host], set()) for host, _ in worker.ranks]
            for kind, base in kinds.items():
                old = kept["ranks"][0].get(kind) if kept else None
                if old and base <= old < base + _PORT_SPAN and not any(ports & self._run(worker, kind, old) for ports in taken):
                    result[worker.name][kind] = old
                    for ports in taken:
                        ports |= self._run(worker, kind, old)
                else:
                    wanted.append((worker, kind, base))
        for worker, kind, base in wanted:
            taken = [used.setdefault(addresses[host], set()) for host, _ in worker.ranks]
            port = next((p for p in range(base, 65536) if not any(ports & self._run(worker, kind, p) for ports in taken)), None)
            if port is None:
                raise UserError(f"no port is left from {base} on for {worker.name} on {worker.ranks[0][0]}")
            result[worker.name][kind] = port
            for ports in taken:
                ports |= self._run(worker, kind, port)
        return result

    def _before(self, worker: Placed, placed: Sequence[Placed]) -> Optional[Json]:
        """The deployed worker whose ports it keeps: the one of its name on its host, else the one that leaves it its GPUs."""
        kept = self._kept(worker.name)
        if kept is not None and kept["role"] == worker.role and kept["ranks"][0]["host"] == worker.ranks[0][0]:
            return kept
        staying, ranks = {(w.name, w.ranks) for w in placed}, list(worker.ranks)
        for old in self._current():
            if list(old.ranks) == ranks and (old.name, old.ranks) not in staying:
                return self._kept(old.name)
        return None

    def _may_switch(self, worker: Placed) -> bool:
        """Whether the engine may change the worker's role while it runs; it then listens for bootstraps whatever its role is."""
        if worker.role == "aggregated" or len(worker.ranks) > 1 or not self.engine.switch_flag:
            return False
        return self._engine_args(worker.ranks[0][0], worker.role).get(self.engine.switch_flag) is True

    def _run(self, worker: Placed, kind: str, first: int) -> Set[int]:
        """The ports that a worker takes from ``first`` on: one, or one for each of its data-parallel replicas."""
        args = self._engine_args(worker.ranks[0][0], worker.role) if kind == "side_channel_port" else {}
        return set(range(first, first + (self.engine.side_channels(args) if args else 1)))

    # -- processes

    def _engine_args(self, host: str, role: str) -> Json:
        """The user's flags for one rank: general ones, overlaid by the role's; the name of a shipped file is its path."""
        settings, result = self.inputs.hosts[host], {}
        shipped = {file.rpartition("/")[2]: f"{settings['state_dir']}/files" for file in map(str, settings["engine_files"])}
        for name in ("engine_args", f"{role}_engine_args"):
            where = f"{name} (host {host})"
            result.update(flags.canonical(self.table, settings.get(name) or {}, where, self.engine.owned))
        return {name: f"{shipped[value]}/{value}" if str(value) in shipped else value for name, value in result.items()}

    def _engine_env(self, host: str, role: str) -> Dict[str, str]:
        """The user's environment for one rank: the transfer engine's variables, the general one, overlaid by the role's."""
        result = transfer.environment(self.inputs.hosts[host], self.engine.name, role, self.backend)
        if self.backend == "mooncake" and role != "aggregated" and self._efa(host):
            result["MOONCAKE_PROTOCOL"] = "efa"
        for name in ("engine_env", f"{role}_engine_env"):
            result.update({key: str(value) for key, value in (self.inputs.hosts[host].get(name) or {}).items()})
        return result

    def _efa(self, host: str) -> bool:
        """Whether Mooncake on a host goes over AWS's EFA: said so, or found where there is no other card."""
        said = self.inputs.hosts[host]["mooncake_protocol"]
        if said is not None:
            return bool(said == "efa")
        cards = self.inputs.discovered.get(host, {}).get("rdma")
        if cards is None:
            return bool(self._deployed(host).get("transfer", {}).get("efa"))
        return transfer.has_efa(cards)

    def _npu(self, host: str) -> bool:
        """Whether the devices of a host's workers are Ascend's."""
        own = self.inputs.hosts[host]
        word = str((own["engine_env"] or {}).get("ENABLE_ASCEND_TRANSFER_WITH_MOONCAKE", "")).lower()
        mooncake = own["ascend_transfer_with_mooncake"] or word in ("1", "true", "yes", "y")
        return self.cluster["transfer_backend"] == "ascend" or bool(mooncake)

    def _on_cpu(self, host: str, role: str) -> bool:
        return self.engine.on_cpu(self._engine_args(host, role), self._engine_env(host, role))

    def _given(self, placed: Sequence[Placed]) -> List[Tuple[str, str, Json]]:
        """(worker, host, the user's flags) of every rank."""
        return [(w.name, host, self._engine_args(host, w.role)) for w in placed for host, _ in w.ranks]

    def _python(self, host: str) -> str:
        settings = self.inputs.hosts[host]
        return provision.engine_python(host, settings, f"{settings['install_dir']}/{self.engine.name}-{self.version}")

    def _rank(
        self,
        worker: Placed,
        index: int,
        ports: Mapping[str, int],
        backend: str,
        addresses: Mapping[str, str],
        links: Mapping[str, Link],
        fabric: Sequence[Setting],
    ) -> Json:
        host, gpus = worker.ranks[index]
        settings = self.inputs.hosts[host]
        listen = settings["listen_address"] or addresses[host]
        in_container = settings["runtime"] in runtimes.CONTAINERS
        context = engines.WorkerContext(
            role=worker.role, python=self._python(host), state_dir=settings["state_dir"],
            model=provision.model_on(settings, self.cluster, self.model),
            served_model_name=self.cluster["served_model_name"] or self.model, listen=listen, port=ports["port"],
            bootstrap_port=ports.get("bootstrap_port"), side_channel_port=ports.get("side_channel_port"),
            tensor_parallel_size=self.shape[worker.role].gpus, nodes=len(worker.ranks), node_rank=index,
            dist_init=f"{addresses[worker.ranks[0][0]]}:{ports.get('dist_init_port', 0)}", transfer_backend=backend,
            node=host, rdma_fabric=links[host].fabric if links[host].devices else "none",
            fabric=fabric, gpus=runtimes.visible(gpus, self._gpus(host)) if in_container else gpus,
            mem_fraction=settings["mem_fraction"], profile=settings["emulated_profile"],
            api_key=self.cluster["api_key"] is not None, admin_api_key=self.cluster["admin_api_key"] is not None,
            address=addresses[host], cache_dir=settings["cache_dir"], npu=self._npu(host),
        )  # fmt: skip
        given = flags.overlaid(self.engine.flags(context), self._engine_args(host, worker.role))
        own = self._engine_env(host, worker.role)
        env = {**self.engine.env(context), **transfer.npu_environment(own, host, worker.name, gpus), **own}
        rank = {
            "host": host, "node_rank": index, "gpus": list(gpus), "unit": f"pd-{worker.name}.service",
            "argv": [*self.engine.command(context), *flags.argv(given)], "env": env, "address": addresses[host],
            "listen": listen, **ports, "rdma_devices": list(links[host].devices),
        }  # fmt: skip
        channels = len(self._run(worker, "side_channel_port", 0)) if "side_channel_port" in ports else 1
        rank.update({"side_channels": channels} if channels > 1 else {})
        if self._may_switch(worker) and backend in self.engine.switch_backends and not in_container:
            # A unit that is called by its port, for its role may become another one.
            rank["unit"] = f"pd-worker-{ports['port']}.service"
            rank["switch"] = {"flag": f"--{self.engine.role_flag}", "role": worker.role}
        if in_container:
            model = context.model if self.engine.needs_model else ""
            rank["container"] = provision.container(rank, settings, self.cluster, model, self._gpus(host), self.accelerated(host))
        if index == 0:
            rank["health_url"] = f"http://{addresses[host]}:{ports['port']}{self.engine.health_path(self.version)}"
        return rank

    def _check_ipc(self, seen: Mapping[Tuple[str, str], str], ends: Mapping[str, str]) -> None:
        """Refuse containers with shared memory of their own where the KV cache is to go by CUDA IPC."""
        for (prefill, decode), transport in seen.items():
            settings = self.inputs.hosts[ends[prefill]]
            if transport == "cuda_ipc" and settings["runtime"] in runtimes.CONTAINERS and settings["engine_shm_size"]:
                raise UserError(
                    f"host {ends[prefill]}: engine_shm_size={settings['engine_shm_size']} takes containers out of the host's IPC "
                    f"namespace, without which no CUDA IPC joins {prefill} and {decode}: leave it out (they have the host's /dev/shm)"
                )

    def _check_shared_memory(self, placed: Sequence[Placed]) -> None:
        for name in self.worker_hosts:
            settings = self.inputs.hosts[name]
            users: Dict[int, List[str]] = {}
            for worker in placed:
                for host, gpus in worker.ranks:
                    for gpu in gpus if host == name else ():
                        users.setdefault(gpu, []).append(worker.name)
            both = [workers for workers in users.values() if len(workers) > 1]
            if not both or self.engine.emulated:
                continue
            if settings["mem_fraction"] is None or settings["mem_fraction"] * 2 > 1:
                raise UserError(
                    f"host {name}: {listing(both[0])} share a GPU (gpus_shared), so mem_fraction must be set to at most 0.5"
                )

    def _router(self, workers: Sequence[Json], addresses: Mapping[str, str]) -> Json:
        host, settings, cluster = self.router_host, self.inputs.hosts[self.router_host], self.cluster
        listen = settings["listen_address"] or addresses[host]
        context = routers.RouterContext(
            python=f"{settings['install_dir']}/{self.router.package}-{self.router.version}/bin/python",
            state_dir=settings["state_dir"], listen=listen, port=cluster["router_port"],
            prometheus_port=cluster["router_prometheus_port"], policy=cluster["router_policy"],
            prefill_policy=cluster["router_prefill_policy"], decode_policy=cluster["router_decode_policy"],
            check_interval=cluster["router_health_check_interval"], ready_timeout=cluster["ready_timeout"],
            disaggregated=self.ratio.disaggregated, engine=self.engine.name,
            workers=[(w["role"], w["url"], w["ranks"][0].get("bootstrap_port")) for w in workers],
            api_key=cluster["api_key"] is not None, tls=bool(cluster["router_tls_cert"]),
        )  # fmt: skip
        extra = self.router.arguments(cluster["router_args"])
        scheme = "https" if cluster["router_tls_cert"] else "http"
        registration = self.router.registers(self.engine.name, self.ratio.disaggregated)
        members = [] if registration else self.router.members(context)
        return {
            "name": self.router.name, "version": self.router.version, "host": host, "unit": "pd-router.service",
            "argv": [*self.router.command(context), *flags.argv({**self.router.flags(context), **extra}), *members],
            # Where members cannot change while it runs, they are what it is restarted for.
            "members": members if self.router.membership == "workers" else [], "membership": self.router.membership,
            "registration": registration, "env": {}, "address": addresses[host], "listen": listen, "port": cluster["router_port"],
            "prometheus_port": cluster["router_prometheus_port"], "url": f"{scheme}://{addresses[host]}:{cluster['router_port']}",
            "metrics_url": f"http://{addresses[host]}:{cluster['router_prometheus_port']}/metrics",
            **({"tls_ca": self.inputs.tls_ca} if cluster["router_tls_cert"] else {}),
        }  # fmt: skip

    def _needs(self, host: str, has_worker: bool, link: Link) -> transfer.Needs:
        """What the host needs for its transfer engines; nothing without workers, and in an image it is the image's business."""
        settings = self.inputs.hosts[host]
        if not has_worker or self.engine.emulated:
            return transfer.Needs()
        build = settings["engine_build"]
        if build == "auto":
            build = "" if settings["engine_requirements"] else self.engine.build(self.version)
            # An engine that was here before, and runs on the CPU, was not built for CUDA.
            build = "cpu" if settings["runtime"] == "existing" and self._cpu_alone(host) else build
        found = self.inputs.discovered.get(host, {}).get("python", {})
        machine, glibc = found.get("machine", ""), found.get("glibc", "")
        about = transfer.Host(host, machine, glibc, bool(link.devices), self._efa(host), self._npu(host))
        needed = transfer.needs(
            about, build, self.engine.transfer_backends, self.backend, settings, settings["runtime"] == "venv"
        )
        return transfer.Needs() if settings["runtime"] in runtimes.CONTAINERS else needed

    def _installs(self, host: str, has_worker: bool, needed: transfer.Needs) -> List[Json]:
        """Virtualenvs that the host needs, in the order in which they are made."""
        settings = self.inputs.hosts[host]
        rows: List[Json] = []
        if settings["service_manager"] != "systemd":
            rows.append({"name": "supervisor", "requirements": ["requirements/supervisor.txt"]})
        if host == self.router_host:
            rows.append({"name": f"{self.router.package}-{self.router.version}", "requirements": list(self.router.requirements)})
        if has_worker and self.cluster["model_source"] == "hub":
            rows.append({"name": "hub", "requirements": ["requirements/hub.txt"]})
        if has_worker and settings["runtime"] == "venv":
            wanted = settings["engine_requirements"] or self.engine.requirements(self.version)
            source = {"source": needed.source} if needed.source else {}
            if needed.source:
                rows.append({"name": needed.source["tools"], "requirements": [transfer.BUILD_TOOLS]})
            rows.append({"name": f"{self.engine.name}-{self.version}", "requirements": [*wanted, *needed.steps], **source})
        if rows:
            self.check_python(host)
        return rows

    def check_python(self, host: str) -> None:
        """Refuse a host whose Python, as far as it is known, virtualenvs of ours cannot be made with."""
        found = self.inputs.discovered.get(host, {}).get("python")
        if found:
            provision.check_python(host, found)

    def make(self) -> Json:
        """Return the plan."""
        self.check_limit()
        self.check_departed()
        self.check_flags()
        placed = self._placement()
        self._check_shared_memory(placed)
        if self.ratio.disaggregated:
            engines.check_alike(
                self.engine, {name: row.get("default") for name, row in self.table.flags.items()}, self._given(placed)
            )
        involved = list(dict.fromkeys([*(host for w in placed for host, _ in w.ranks), self.router_host]))
        involved.sort(key=self._inventory_order)
        addresses = {name: self.address(name) for name in involved}
        ends = {w.name: w.ranks[0][0] for w in placed}
        with_rank = {host for w in placed for host, _ in w.ranks}
        links = {name: self._link(name, name in with_rank) for name in involved}
        ports = self._ports(placed, addresses)
        pairs = [(p.name, d.name) for p in placed if p.role == "prefill" for d in placed if d.role == "decode"]
        between = [(ends[p], ends[d]) for p, d in pairs]
        backend, reason = choose_backend(self.cluster["transfer_backend"], self.engine.transfer_backends, between, links)
        self.backend = backend if pairs else "none"
        envs = {w.name: self._engine_env(ends[w.name], w.role) for w in placed}
        tcp = forces_tcp(backend, between, links, [envs[p] for p, _ in pairs])
        on_cpu = {w.name: self._on_cpu(ends[w.name], w.role) for w in placed}
        seen = {
            (p, d): expected_transport("mooncake_tcp" if tcp else backend, ends[p], ends[d], links, on_cpu[p], envs[p])
            for p, d in pairs
        }
        self._check_ipc(seen, ends)
        workers: List[Json] = []
        rows: Dict[str, List[Setting]] = {name: [] for name in involved}
        for worker in placed:
            ranks = []
            for index, (host, gpus) in enumerate(worker.ranks):
                fabric = self._fabric(worker, host, gpus, backend, links[host], tcp)
                rows[host] += fabric
                ranks.append(self._rank(worker, index, ports[worker.name], backend, addresses, links, fabric))
            url = f"http://{ranks[0]['address']}:{ranks[0]['port']}"
            workers.append({"name": worker.name, "role": worker.role, "url": url, "ranks": ranks})
        self.check_frozen(workers)
        made = {
            "schema": plan_file.SCHEMA,
            "ratio": str(self.ratio),
            "engine": self.engine.name,
            "engine_version": self.version,
            "emulated": self.engine.emulated,
            "on_cpu": any(on_cpu.values()),
            "truncated": engines.truncated(self.engine, [args for _, _, args in self._given(placed)]),
            "pair_probe": self.engine.pair_probe,
            "model": self.model,
            "served_model_name": self.cluster["served_model_name"] or self.model,
            "api_key": self.cluster["api_key"] is not None,
            "admin_api_key": self.cluster["admin_api_key"] is not None,
            # Aggregated workers move no KV cache, whatever is set for those that do.
            "transfer_backend": backend if pairs else "none",
            "transfer_backend_reason": reason if pairs else "aggregated workers move no KV cache",
            "pairs": [{"prefill": p, "decode": d, "expected_transport": seen[p, d]} for p, d in pairs],
            "workers": workers,
            "router": self._router(workers, addresses),
            "hosts": {name: self._host_entry(name, addresses, links[name], rows[name], name in with_rank) for name in involved},
            "overrides": dict(self.inputs.overrides),
            **self._firewall(involved),
        }
        firewall.check(made, self.inputs.current, self.inputs.limit)
        return made

    def _firewall(self, involved: Sequence[str]) -> Json:
        """Who, beside hosts with workers and the router, is let in where a host has a firewall; {} where none has."""
        if not any(self.inputs.hosts[name]["firewall"] for name in involved):
            return {}
        clients = self.inputs.groups["bench_clients"]
        bench = {name: self.address(name) for name in clients}
        meet = {"meet_port": self.cluster["bench_meet_port"]} if len(clients) > 1 else {}
        admitted = {"clients": self.cluster["firewall_clients"], "monitors": self.cluster["firewall_monitors"]}
        return {"firewall": {"bench": bench, **admitted, **meet}}

    def _walled(self, name: str) -> Json:
        """What a host's own firewall is made of; {} where it has none."""
        settings = self.inputs.hosts[name]
        if not settings["firewall"]:
            return {}
        if settings["service_manager"] == "supervisord":
            raise UserError(
                f"host {name}: firewall: true needs root and systemd, and its services are supervisord's: "
                "set ansible_become (docs/hosts.md), or firewall: false for it"
            )
        if not self.inputs.discovered.get(name, {}).get("nft", True):
            raise UserError(
                f"host {name}: firewall: true needs nft, which it has not: apt-get install nftables (or its like) there"
            )
        found = self.inputs.discovered.get(name, {}).get("port_range") or (self._deployed(name).get("firewall") or {}).get(
            "range"
        )
        return {"firewall": {"spared": settings["firewall_spared_ports"], "range": list(found or firewall.RANDOM_PORTS)}}

    def _fabric(self, worker: Placed, host: str, gpus: Sequence[int], backend: str, link: Link, tcp: bool) -> List[Setting]:
        """What the host's RDMA mask means for one rank; an emulated engine opens no device."""
        if self.engine.emulated:
            return []
        use = Use(
            backend="none" if worker.role == "aggregated" else backend,
            gpus=gpus,
            nodes=len(worker.ranks),
            nvshmem=self.engine.nvshmem(self._engine_args(host, worker.role)),
            per_gpu=self.inputs.hosts[host]["rdma_device_per_gpu"],
            force_tcp=tcp,
            own=self._engine_env(host, worker.role),
            excluded=self.inputs.hosts[host]["rdma_devices_excluded"],
        )
        return settings_for(host, link, use)

    def _host_entry(
        self, name: str, addresses: Mapping[str, str], link: Link, settings_of_mask: Sequence[Setting], has_worker: bool
    ) -> Json:
        settings = self.inputs.hosts[name]
        needed = self._needs(name, has_worker, link)
        return {
            "address": addresses[name],
            "gpus": list(self._gpus(name)) if name in self.worker_hosts else [],
            "rdma_fabric": link.fabric,
            "rdma_devices": list(link.devices),
            "link": link.to_json(),
            "fabric": shown(link, settings_of_mask) if has_worker and not self.engine.emulated else [],
            "service_manager": settings["service_manager"],
            "service_user": settings["service_user"],
            "state_dir": settings["state_dir"],
            "install_dir": settings["install_dir"],
            "venv_python": settings["venv_python"],
            "installs": self._installs(name, has_worker, needed),
            **({"transfer": {"system": needed.system, "efa": self._efa(name)}} if needed.system else {}),
            **(self._provided(name) if has_worker else {}),
            "files": [str(file) for file in settings["engine_files"]] if has_worker else [],
            "cache_dir": settings["cache_dir"] if has_worker else None,
            **self._walled(name),
        }

    def _provided(self, name: str) -> Json:
        """``runtime`` and ``model`` of a host: what is checked, or fetched, before its workers start."""
        settings = self.inputs.hosts[name]
        if self.engine.needs_model and self.cluster["model_source"] == "path":
            provision.check_model(name, self.model, self.inputs.discovered.get(name, {}).get("model"))
        about = {"engine": self.engine.name, "package": self.engine.package or self.engine.name, "version": self.version}
        about["python"] = self._python(name)
        return provision.of_host(name, settings, self.cluster, about, self.model, self.engine.needs_model, self.accelerated(name))


def make_plan(inputs: Inputs) -> Json:
    """Return the plan as JSON (DESIGN section 2); raise UserError with everything the user needs to put it right."""
    return Planner(inputs).make()


def check_group_names(groups: Mapping[str, Sequence[str]]) -> None:
    """Refuse an inventory that lacks one of our groups (it may be empty, it may not be absent)."""
    absent = [name for name in GROUPS if name not in groups]
    if absent:
        raise UserError(
            f"the inventory has no group {listing(absent)}: every inventory defines {listing(GROUPS)}, empty if unused"
        )


def inventory_id(sources: Sequence[str]) -> str:
    """Return a short name for an inventory: its folder's name and a hash of its path."""
    names = "+".join(source.rstrip("/").rsplit("/", 1)[-1] for source in sources)
    return f"{names}-{hashlib.sha256(' '.join(sources).encode()).hexdigest()[:8]}"


def started_as(worker: Mapping[str, Any]) -> Tuple[str, str, str]:
    """Return what tells a worker of one plan from that of another: its name, where it answers, how it is started."""
    # The deployed plan comes from a file, where keys have another order.
    ranks = [[rank["host"], rank["argv"], rank["env"], rank.get("container")] for rank in worker["ranks"]]
    return worker["name"], worker["url"], json.dumps(ranks, sort_keys=True)


def leaving(current: Optional[Mapping[str, Any]], plan: Mapping[str, Any]) -> Dict[str, str]:
    """Return (name -> URL) the workers of the deployed plan that the new plan stops or starts anew.

    The router must let go of them first, also of those that come back at the same URL.
    """
    staying = {started_as(worker) for worker in plan["workers"]}
    return {worker["name"]: worker["url"] for worker in (current or {}).get("workers", []) if started_as(worker) not in staying}
