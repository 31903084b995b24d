"""The plan: the one description of what runs where, made from inventory, ratio and what runs today. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from . import engines, firewall, plan_file, plan_hosts, plan_ports, plan_processes, runtimes, transfer
from . import ratio as ratios
from .errors import UserError, listing
from .fabric_mask import Setting
from .fabric_ways import choose_backend, expected_transport, forces_tcp
from .plan_site import Site
from .topology import Host, Placed, attempt, fullest_ratios, place

Json = Dict[str, Any]


class Planner(Site):
    """Makes one plan (`make`); what is asked before that refuses bad input without it."""

    def check_flags(self) -> None:
        """Refuse wrong flags of the router and of any worker host, before placement says which hosts are used."""
        self.router.arguments(self.cluster["router_args"])
        for name in self.worker_hosts:
            transfer.check(name, self.engine.name, self.inputs.hosts[name])
            for role in self.ratio.counts():
                self.engine_args(name, role)

    def ratios(self) -> List[ratios.Ratio]:
        """Return the ratios that use the inventory's GPUs as far as they go, and aggregated workers on as many."""
        shared = [name for name in self.worker_hosts if self.inputs.hosts[name]["gpus_shared"]]
        if shared:
            raise UserError(
                f"host {shared[0]}: gpus_shared is set: how workers that share a GPU slow each other down is not known"
            )
        return fullest_ratios(self.shape, [self.host(name) for name in self.worker_hosts])

    def check_fits(self) -> None:
        """Refuse a ratio that the hosts have no room for."""
        self._placement()

    def check_limit(self, also: Sequence[str] = ()) -> None:
        """Refuse a ``--limit`` that leaves out the router (or a host of ``also``), naming it and what to type."""
        limit = self.inputs.limit
        for host, what in [(self.router_host, "the router"), *((name, "the bench client") for name in also)]:
            if limit is not None and host not in limit:
                typed = ",".join(sorted({*limit, host}, key=self.inventory_order))
                raise UserError(f"--limit leaves out {host}, {what}: type -l {typed}")

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
            kept = self.kept(worker["name"])
            if outside and kept is not None and kept["ranks"] != worker["ranks"]:
                typed = ",".join(sorted({*limit, *outside}, key=self.inventory_order))
                raise UserError(
                    f"--limit leaves out {listing(dict.fromkeys(outside))}, and {worker['name']} there would change: type -l {typed}"
                )

    def _placement(self) -> List[Placed]:
        hosts, current = [self.host(name) for name in self.worker_hosts], self.running()
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
                    f"type -l {','.join([*sorted(limit, key=self.inventory_order), *missing])}"
                )
        return found if found is not None else place(self.ratio, self.shape, hosts, current)

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

    def _check_ipc(self, seen: Mapping[Tuple[str, str], str], ends: Mapping[str, str]) -> None:
        """Refuse containers with shared memory of their own where the KV cache is to go by CUDA IPC."""
        for (prefill, decode), transport in seen.items():
            settings = self.inputs.hosts[ends[prefill]]
            if transport == "cuda_ipc" and settings["runtime"] in runtimes.CONTAINERS and settings["engine_shm_size"]:
                raise UserError(
                    f"host {ends[prefill]}: engine_shm_size={settings['engine_shm_size']} takes containers out of the host's IPC "
                    f"namespace, without which no CUDA IPC joins {prefill} and {decode}: leave it out (they have the host's /dev/shm)"
                )

    def _given(self, placed: Sequence[Placed]) -> List[Tuple[str, str, Json]]:
        """(worker, host, the user's flags) of every rank."""
        return [(w.name, host, self.engine_args(host, w.role)) for w in placed for host, _ in w.ranks]

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
        involved.sort(key=self.inventory_order)
        addresses = {name: self.address(name) for name in involved}
        ends = {w.name: w.ranks[0][0] for w in placed}
        with_rank = {host for w in placed for host, _ in w.ranks}
        links = {name: self.link(name, name in with_rank) for name in involved}
        ports = plan_ports.assigned(self, placed, addresses)
        pairs = [(p.name, d.name) for p in placed if p.role == "prefill" for d in placed if d.role == "decode"]
        between = [(ends[p], ends[d]) for p, d in pairs]
        backend, reason = choose_backend(self.cluster["transfer_backend"], self.engine.transfer_backends, between, links)
        self.backend = backend if pairs else "none"
        envs = {w.name: self.engine_env(ends[w.name], w.role) for w in placed}
        tcp = forces_tcp(backend, between, links, [envs[p] for p, _ in pairs])
        on_cpu = {w.name: self.on_cpu(ends[w.name], w.role) for w in placed}
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
                fabric = plan_hosts.fabric_of(self, worker, host, gpus, backend, links[host], tcp)
                rows[host] += fabric
                ports_of = ports[worker.name]
                ranks.append(plan_processes.rank_of(self, worker, index, ports_of, backend, addresses, links, fabric))
            url = f"http://{ranks[0]['address']}:{ranks[0]['port']}"
            workers.append({"name": worker.name, "role": worker.role, "url": url, "ranks": ranks, **self.meeting(worker.name)})
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
            "hf_token": self.hub_token,
            # Aggregated workers move no KV cache, whatever is set for those that do.
            "transfer_backend": backend if pairs else "none",
            "transfer_backend_reason": reason if pairs else "aggregated workers move no KV cache",
            "pairs": [{"prefill": p, "decode": d, "expected_transport": seen[p, d]} for p, d in pairs],
            "workers": workers,
            "router": plan_processes.router_of(self, workers, addresses),
            "hosts": {
                name: plan_hosts.entry(self, name, addresses, links[name], rows[name], name in with_rank) for name in involved
            },
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


def inventory_id(sources: Sequence[str]) -> str:
    """Return a short name for an inventory: its folder's name and a hash of its path."""
    names = "+".join(source.rstrip("/").rsplit("/", 1)[-1] for source in sources)
    return f"{names}-{hashlib.sha256(' '.join(sources).encode()).hexdigest()[:8]}"


def started_as(worker: Mapping[str, Any]) -> Tuple[str, str, str]:
    """Return what tells a worker of one plan from that of another: its name, where it answers, how it is started."""
    # The deployed plan comes from a file, where keys have another order.
    ranks = [[rank["host"], rank["argv"], rank["env"], rank.get("container")] for rank in worker["ranks"]]
    return worker["name"], worker["url"], json.dumps([ranks, worker.get("meeting", 0)], sort_keys=True)


def leaving(current: Optional[Mapping[str, Any]], plan: Mapping[str, Any]) -> Dict[str, str]:
    """Return (name -> URL) the workers of the deployed plan that the new plan stops or starts anew.

    The router must let go of them first, also of those that come back at the same URL.
    """
    staying = {started_as(worker) for worker in plan["workers"]}
    return {worker["name"]: worker["url"] for worker in (current or {}).get("workers", []) if started_as(worker) not in staying}
