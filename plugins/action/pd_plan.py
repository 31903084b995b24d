"""Check everything the user wrote and make the plan, without contacting a host."""

from __future__ import annotations

import getpass
import importlib.util
import os
import secrets
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ansible import context
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.plugins.action import ActionBase
from ansible.template import Templar
from ansible.utils.display import Display
from ansible.utils.vars import load_extra_vars

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "library" / "module_utils"))

from pdlib import (  # noqa: E402
    bench_peers,
    bench_spec,
    engines,
    firewall,
    folders,
    keys,
    moves,
    plan,
    plan_file,
    plan_files,
    plan_inputs,
    probe,
    processes,
    profile_spec,
    settings,
    tables,
    tls,
    units,
)
from pdlib.errors import UserError, listing  # noqa: E402
from pdlib.variables import BENCH, ONLY_TYPED, VARIABLES, VERB  # noqa: E402

display = Display()


#: Variables that say where a host is. No others are rendered to look at them: some are passwords, or lookups that make one.
WHERE = ("ansible_host", "ansible_port")
#: Verbs that send a load to what is deployed.
MEASURING = ("bench", "profile")


class ActionModule(ActionBase):
    """`pd_plan: {verb: deploy}`; documented in library/pd_plan.py."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset({"verb", "discovered", "show"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the plan and what is derived from it; plays register it as `__pd_planned` (the role pd)."""
        super().run(tmp, task_vars)
        try:
            return self._run(task_vars or {})
        except UserError as error:
            raise AnsibleActionFail(str(error)) from None

    def _run(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        #: keys of our own making, by name
        self._generated: dict[str, str] = {}
        verb, discovered = self._task.args["verb"], bool(self._task.args.get("discovered"))
        extra = dict(load_extra_vars(loader=self._loader))
        settings.check_extra_vars(extra)
        settings.check_typed(extra, [str(word) for word in context.CLIARGS.get("extra_vars") or ()])
        measures = verb in MEASURING
        if measures and not (importlib.util.find_spec("pdbench") or (ROOT / ".venv" / "bin" / "python").exists()):
            raise UserError(f"{verb}.yml reads what was measured with pdbench, which this Ansible's Python has not: make setup")
        groups = {name: list(hosts) for name, hosts in task_vars["groups"].items()}
        ours = list(dict.fromkeys(host for group in plan_inputs.GROUPS for host in groups.get(group, [])))
        hostvars = task_vars["hostvars"]
        current = self._current(verb, task_vars, discovered)
        as_deployed = measures or verb in ("doctor", "rebalance")
        if verb == "rebalance" and "ratio" not in extra:
            raise UserError("rebalance.yml takes the ratio to change to: ansible-playbook rebalance.yml -e ratio=2p2d")
        inherited = dict((current or {}).get("overrides", {})) if as_deployed else {}
        inherited = {name: value for name, value in inherited.items() if name not in extra}
        if as_deployed and current and "ratio" not in extra:
            inherited["ratio"] = current["ratio"]
        by_host: dict[str, dict[str, Any]] = {}
        for host in ours:
            given = {name: hostvars[host].get(name) for name in VARIABLES if name not in ONLY_TYPED or name in extra}
            given |= {name: self._key(name, given[name], current if as_deployed else None) for name in keys.SHARED}
            by_host[host] = settings.host_settings(host, {**given, **inherited}, extra)
        settings.check_inventory_names({host: self._own_names(hostvars, host) for host in ours})
        self._check_connections(hostvars, ours)
        plan_inputs.check_group_names(groups)
        cluster = settings.cluster_settings(by_host)
        local = [h for h in ours if hostvars[h].get("ansible_connection") == "local"]
        settings.check_state_dirs({h: by_host[h]["state_dir"] for h in local})
        settings.check_templates(extra)
        found = {
            h: hostvars[h]["__pd_found"]["found"] for h in ours if discovered and "found" in hostvars[h].get("__pd_found", {})
        }
        if discovered and verb not in ("doctor", "teardown"):
            owners = {host: found[host].get("deployment", "") for host in found}
            folders.refuse_others(owners, task_vars.get("__pd_deployed", {}).get("deployment", ""))
        # Hosts that --limit leaves out are as they were deployed.
        known = {**(current or {}).get("hosts", {}), **found}
        for host in by_host:
            if by_host[host]["service_manager"] == "auto" and host in known:
                by_host[host]["service_manager"] = known[host]["service_manager"]
        limit = context.CLIARGS.get("subset")
        inputs = plan_inputs.Inputs(
            groups=groups,
            cluster=cluster,
            hosts=by_host,
            limit=frozenset(self._limited(task_vars)) if limit and verb != "doctor" else None,
            current=current,
            discovered=found,
            tls_ca="" if verb in ("doctor", "teardown", "watch") else self._trusted(cluster, None),
            overrides={**inherited, **{k: v for k, v in extra.items() if self._is_override(k, v)}},
        )
        facts: dict[str, Any] = {"pd_plan": {}, "pd_hosts": self._host_facts(by_host), "pd_owner": self._owner(verb, cluster)}
        if verb not in ("teardown", "watch"):
            planner = plan.Planner(inputs)
            if verb == "doctor":
                facts |= self._examined(planner, ours)
                together = self._meet(planner, groups["bench_clients"], cluster)
                facts["pd_examined"] |= {"inventory": self._inventory(), "meet": together}
                return {"changed": False, **facts, **self._common(cluster)}
            for name in (*keys.SHARED, keys.HUB) if measures or verb == "rebalance" else ():
                if current and current.get(name) and cluster[name] is None:
                    environment = f"{keys.ENVIRONMENT[name]}, " if name in keys.ENVIRONMENT else ""
                    raise UserError(
                        f"the deployment has an {name}, and {verb}.yml has none: give it the same one (vault, "
                        f"{environment}or -e @file)"
                    )
            clients = groups["bench_clients"]
            planner.check_limit(clients if measures else [])
            if measures:
                bench_peers.check(cluster, planner.engine.emulated, len(clients))
            open_hosts = [] if discovered or verb == "plan" else planner.left_to_discover()
            if open_hosts:
                # The second look plans; this one has checked all that can be without asking the hosts.
                planner.check_flags()
                display.display(f"\n{listing(open_hosts)}: the inventory leaves things open that are looked for there\n")
                facts["pd_accelerators"] = {host: planner.accelerated(host) for host in ours}
                return {"changed": False, **facts, **self._common(cluster)}
            try:
                made = planner.make()
            except UserError:
                if discovered or not current or verb == "plan":
                    raise
                # The controller's copy may be out of date: what is wrong without it is wrong, all else is for the second
                # look, which asks the router's host.
                made = plan.Planner(replace(inputs, current=None)).make()
            plan_files.check(made, ROOT)
            self._trusted(cluster, made["router"]["address"])
            if verb == "rebalance":
                facts["pd_moves"] = self._moves(current or {}, made, discovered)
            if measures:
                # A profile's load is one batch, which one client sends.
                senders = clients if verb == "bench" else clients[:1]
                several = len(senders) > 1
                meet = bench_spec.meet(planner.address(clients[0]), cluster) if several else ""
                key = secrets.token_hex(16) if several else ""
                facts["pd_bench"] = bench_spec.make(made, cluster, senders, by_host, str(ROOT), time.time(), meet, key)
                if verb == "profile":
                    facts["pd_bench"] = profile_spec.make(facts["pd_bench"], made, cluster)
                for client in facts["pd_bench"]["clients"]:
                    planner.check_python(client)
            facts["pd_probe"] = self._probe(made, cluster["kv_probe"], current, inputs.limit) | {"inventory": self._inventory()}
            if verb != "plan":
                made["kv_probe"] = facts["pd_probe"]["known"]
            facts["pd_plan"] = made
            facts["pd_units"] = {host: units.host_units(made, host) for host in made["hosts"]}
            facts["pd_leaving"] = plan.leaving(current, made)
            has = {host: found.get(host, {}).get("firewall") == own["state_dir"] for host, own in by_host.items()}
            facts["pd_firewall"] = firewall.changes(current, made, has)
            facts["pd_accelerators"] = {host: planner.accelerated(host) for host in ours}
            if discovered and not self._task.check_mode:
                for name, key in self._generated.items():
                    keys.keep(self._key_folder() / name, key)
            if self._task.args.get("show"):
                changes = [tables.moves(facts["pd_moves"]["moves"])] if verb == "rebalance" else []
                display.display("\n" + "\n".join([tables.workers(made), facts["pd_probe"]["says"], *changes]) + "\n")
        elif groups["bench_clients"]:
            facts["pd_bench"] = bench_spec.home(cluster, groups["bench_clients"], by_host, str(ROOT))
        result: dict[str, Any] = {"changed": False, **facts, **self._common(cluster)}
        if verb == "plan":
            result["changed"] = self._write(cluster["plan_dir"], made)
        return result

    @staticmethod
    def _moves(current: dict[str, Any], made: dict[str, Any], discovered: bool) -> dict[str, Any]:
        """What changes while the deployment serves; before the router's host was asked, only what cannot be whatever it says."""
        moves.check(current if discovered else None, made)
        return moves.summary(current, made) if discovered else {}

    @staticmethod
    def _probe(made: dict[str, Any], mode: str, current: dict[str, Any] | None, limit: frozenset[str] | None) -> dict[str, Any]:
        """What the KV path probe has to do; what a host's engine is installed from is part of a path."""
        locks, reads = plan_files.locks(made, ROOT), engines.engine(made["engine"]).kv_reads
        return probe.work(made, (current or {}).get("kv_probe"), mode, limit, locks, reads)

    @staticmethod
    def _examined(planner: plan.Planner, ours: list[str]) -> dict[str, Any]:
        """What doctor.yml looks at: the deployed plan, else the one that would be; that there is none is a finding, no end."""
        current, refused = planner.inputs.current, ""
        made: dict[str, Any] = {}
        try:
            made = planner.make()
        except UserError as error:
            refused = str(error)
        shown = current or made
        return {
            "pd_plan": shown,
            "pd_examined": {"deployed": bool(current), "refused": refused},
            "pd_units": {host: units.host_units(shown, host) for host in shown.get("hosts", {})},
            "pd_leaving": plan.leaving(current, made) if current and made else {},
            "pd_accelerators": {host: planner.accelerated(host) for host in ours},
        }

    def _trusted(self, cluster: dict[str, Any], address: str | None) -> str:
        """Return what clients of the router trust (PEM), "" where it speaks no TLS; raise UserError for what they would not."""
        names = (keys.CERT, keys.CERT_KEY, "router_tls_ca")
        if not all(cluster[name] for name in names[:2]):
            return ""
        cert, key, ca = (self._real_file(name, cluster[name] or cluster[keys.CERT]) for name in names)
        return tls.check(cert, key, ca, address)

    def _real_file(self, name: str, given: str) -> str:
        """Return a file of the controller, deciphered when it is in a vault; raise UserError unless it can be read."""
        path = ROOT / given
        try:
            real = str(self._loader.get_real_file(str(path)))
        except AnsibleError:
            raise UserError(f"{name}={given}: there is no such file, or it cannot be read (relative to the checkout)") from None
        if name == keys.CERT_KEY and real == str(path) and path.stat().st_mode & 0o077:
            raise UserError(
                f"{name}={given} has mode {path.stat().st_mode & 0o777:04o}, so others can read it: chmod 600 {given}"
            )
        return real

    @staticmethod
    def _common(cluster: dict[str, Any]) -> dict[str, Any]:
        return {
            "pd_settings": {k: v for k, v in cluster.items() if not VARIABLES[k].secret},
            "pd_live_pids": [p.pid for p in processes.all_processes() if "ansible" in p.command],
        }

    def _current(self, verb: str, task_vars: dict[str, Any], discovered: bool) -> dict[str, Any] | None:
        """The deployed plan: the router host's own once it was read, the controller's copy before."""
        if discovered and verb == "doctor":
            router = task_vars["hostvars"][task_vars["groups"]["router"][0]]
            if "deployed" in router.get("__pd_found", {}):
                return dict(router["__pd_found"]["deployed"]) or None
        elif discovered:
            return task_vars.get("__pd_deployed", {}).get("plan") or None
        named = task_vars["hostvars"][task_vars["inventory_hostname"]].get("current_plan")
        path = Path(str(named)) if named else self._copy_path()
        if not path.is_absolute():
            path = ROOT / path
        if verb == "plan" and not named:
            return None
        try:
            text = path.read_text()
        except FileNotFoundError:
            if named:
                raise UserError(f"current_plan={named}: there is no such file") from None
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error})") from None
        right = "name another one, or leave current_plan out" if named else "take the file away, and deploy_pd.yml makes it anew"
        return plan_file.parse(text, str(path), right)

    @staticmethod
    def _inventory() -> str:
        sources = [str(Path(source).resolve()) for source in context.CLIARGS.get("inventory") or ["default"]]
        return plan.inventory_id(sources)

    def _copy_path(self) -> Path:
        return ROOT / ".pd" / "deployed" / f"{self._inventory()}.json"

    def _key_folder(self) -> Path:
        return ROOT / ".pd" / "keys" / self._inventory()

    def _key(self, name: str, given: Any, current: dict[str, Any] | None) -> Any:
        """Return a key as a host's variables mean it; ``current``: the deployment that it must be the key of, if any."""
        if given is None and os.environ.get(keys.ENVIRONMENT[name]) == keys.GENERATE:
            given = keys.GENERATE
        if given != keys.GENERATE:
            return keys.resolve(name, given, os.environ, self._key_folder())
        if name not in self._generated:
            path = self._key_folder() / name
            if current and current.get(name) and not path.exists():
                raise UserError(
                    f"{name} is {keys.GENERATE}, and {path} is not here: bring it from the controller that deployed; or "
                    "deploy_pd.yml makes a new one, and all workers restart"
                )
            self._generated[name] = keys.resolve(name, given, os.environ, self._key_folder())
        return self._generated[name]

    @staticmethod
    def _meet(planner: plan.Planner, clients: list[str], cluster: dict[str, Any]) -> dict[str, Any]:
        """Where several bench clients meet, {} for one; the address of a host that could not be asked may be open."""
        try:
            return {"address": planner.address(clients[0]), "port": cluster["bench_meet_port"]} if len(clients) > 1 else {}
        except UserError:
            return {}

    def _check_connections(self, hostvars: Any, hosts: list[str]) -> None:
        """Refuse what says where a host is, and says something else where a task is delegated to it.

        Ansible renders a delegated host's variables with the inventory_hostname of the host that delegates
        (VariableManager.get_delegated_vars_and_hostname): the lock and the plan would go to another host.
        """
        for host in hosts:
            raw = dict(hostvars.raw_get(host))
            for name, value in ((name, raw.get(name)) for name in WHERE):
                if isinstance(value, str) and "{{" in value:
                    own, other = (self._rendered(value, {**raw, "inventory_hostname": who}) for who in (host, f"not-{host}"))
                    if own != other:
                        raise UserError(
                            f"{name} of {host} depends on inventory_hostname, which is another host's where Ansible delegates a "
                            f"task to {host}, so that it would reach that one: give every host its own, {name}: {own}"
                        )

    def _rendered(self, value: str, variables: dict[str, Any]) -> str:
        try:
            return str(Templar(loader=self._loader, variables=variables).template(value))
        except AnsibleError as error:
            return f"({type(error).__name__})"

    @staticmethod
    def _own_names(hostvars: Any, host: str) -> list[str]:
        magic = {"groups", "group_names", "omit", "playbook_dir", "role_names", "role_name", "play_hosts", "environment"}
        names = hostvars.raw_get(host).keys()
        return [n for n in names if n not in magic and not n.startswith(("ansible_", "inventory_", "pd_", "_"))]

    @staticmethod
    def _is_override(name: str, value: Any) -> bool:
        row = VARIABLES.get(name)
        if row is None or row.secret:
            return False
        # Who deployed with a path that is not as expected need not say so again to measure; `always` was for that deploy.
        return row.scope not in (BENCH, VERB) or (name == "kv_probe" and value in ("report", "never"))

    @staticmethod
    def _limited(task_vars: dict[str, Any]) -> list[str]:
        return list(task_vars["ansible_play_hosts_all"])

    @staticmethod
    def _host_facts(by_host: dict[str, dict[str, Any]]) -> dict[str, Any]:
        names = ["state_dir", "install_dir", "service_manager", "service_user", "venv_python", "wheelhouse"]
        names += ["model_dir", "cache_dir", "runtime", "engine_python", "mem_fraction"]
        return {host: {name: values[name] for name in names} for host, values in by_host.items()}

    def _owner(self, verb: str, cluster: dict[str, Any]) -> dict[str, Any]:
        return {
            "controller": socket.gethostname(),
            "place": processes.place(),
            "sees_all": processes.sees_all(),
            "pid": os.getppid(),
            "user": getpass.getuser(),
            "verb": verb,
            "plan_copy": str(self._copy_path()),
            "private": {"folder": str(self._key_folder()), **{name: cluster[name] for name in (keys.CERT, keys.CERT_KEY)}},
            "own_key": str(self._key_folder() / keys.API) if keys.API in self._generated else "",
        }

    @staticmethod
    def _write(plan_dir: str, made: dict[str, Any]) -> bool:
        changed, count = plan_files.write(ROOT / plan_dir, made)
        display.display(f"Written: {ROOT / plan_dir}/plan.json and {count} unit files beside it\n")
        return changed
