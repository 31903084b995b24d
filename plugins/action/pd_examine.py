"""Look at hosts and the deployment for doctor.yml, judge what was seen, print it, and keep it."""

from __future__ import annotations

import json
import re
import sys
import time
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "library" / "module_utils"))

from pdlib import deployed, doctor, doctor_reach  # noqa: E402
from pdlib.doctor_facts import Seen  # noqa: E402

Json = dict[str, Any]
display = Display()
#: Seconds: what a pair may take for its answer (the first over a new NIXL pair takes up to 3), how long hosts wait for each other
#: to come, and for each host more, which Ansible may start later.
_PAIR_S, _WINDOW_S, _WINDOW_HOST_S = 15.0, 6.0, 0.4
#: The lock of the CUDA runtime, on Linux.
_CUDA = re.compile(r"^nvidia-cuda-runtime(?:-cu\d+)?==([0-9.]+)(?!.*==\s*'(?:darwin|s390x)')", re.M)


def is_name(address: str) -> bool:
    """Whether an address is a name that hosts must resolve."""
    try:
        ip_address(address)
    except ValueError:
        return True
    return False


def wheel_cuda(requirements: list[str]) -> str:
    """Return the CUDA runtime that requirement files of the checkout bring, "" where they name none."""
    for name in requirements:
        path = ROOT / name.removeprefix("no-deps:")
        match = _CUDA.search(path.read_text()) if path.is_file() else None
        if match:
            return match[1]
    return ""


class ActionModule(ActionBase):
    """`pd_examine: {look: host}`; documented in library/pd_examine.py."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset({"look"})

    def run(self, tmp: str | None = None, task_vars: Json | None = None) -> Json:
        """Do the one thing that ``look`` names."""
        super().run(tmp, task_vars)
        variables = task_vars or {}
        self.planned: Json = variables["__pd_planned"]
        self.plan: Json = self.planned["pd_plan"]
        look = {"host": self._host, "network": self._network, "findings": self._findings}[self._task.args["look"]]
        return look(variables)

    def _call(self, arguments: Json, variables: Json) -> Json:
        """Call pd_doctor; what keeps it from an answer is in ``lost``."""
        try:
            result = dict(self._execute_module(module_name="pd_doctor", module_args=arguments, task_vars=variables))
        except AnsibleConnectionFailure as error:
            return {"changed": False, "lost": f"cannot be reached: {' '.join(str(error).split())}"}
        result.pop("invocation", None)
        if result.get("unreachable") or result.get("failed"):
            crash = getattr(getattr(result.get("exception"), "event", None), "msg", "")
            said = [result.get("msg"), result.get("module_stderr"), crash, f"pd_doctor ended with {result.get('rc')}"]
            why = next(str(text).strip() for text in said if text and str(text).strip())
            word = "cannot be reached" if result.get("unreachable") else "cannot be examined"
            return {"changed": False, "lost": f"{word}: {why.splitlines()[-1].strip()}"}
        return result

    # -- on a host

    def _host(self, variables: Json) -> Json:
        host = variables["inventory_hostname"]
        own, entry = self.planned["pd_hosts"][host], self.plan.get("hosts", {}).get(host, {})
        settings, emulated = self.planned["pd_settings"], self.plan.get("emulated", False)
        folders = ("state_dir", "install_dir") + (() if emulated else ("model_dir", "cache_dir"))
        pythons = {row["name"]: f"{own['install_dir']}/{row['name']}/bin/python" for row in entry.get("installs", [])}
        if own["runtime"] == "existing" and own["engine_python"]:
            path = own["engine_python"]
            pythons["engine"] = path if "python" in Path(path).name else f"{path.rstrip('/')}/bin/python"
        addresses = [str(row["address"]) for row in self.plan.get("hosts", {}).values()]
        task = {
            "accelerators": bool(self.planned["pd_accelerators"].get(host)),
            "state_dir": own["state_dir"],
            "install_dir": own["install_dir"],
            "service_manager": own["service_manager"],
            "folders": {name: own[name] for name in folders},
            "names": [address for address in addresses if is_name(address)],
            "units": [{key: unit[key] for key in ("name", "listen", "ports")} for unit in self.planned["pd_units"].get(host, [])],
            "runtime": own["runtime"],
            "pythons": pythons,
            "pythonpath": entry.get("runtime", {}).get("env", {}).get("PYTHONPATH", ""),
        }
        arguments = {"look": "host", "task": task, "python": own["venv_python"] or "", "state_dir": own["state_dir"]}
        asked = time.time()
        result = self._call({**arguments, "model": settings.get("model") or ""}, variables)
        return {**result, "asked": asked, "answered": time.time()}

    # -- between hosts

    def _hosts(self, variables: Json) -> dict[str, Json]:
        """What was seen on each host that was examined."""
        rows = {host: variables["hostvars"][host].get("__pd_found", {}) for host in variables["ansible_play_hosts_all"]}
        return {host: row for host, row in rows.items() if "host" in row}

    def _network(self, variables: Json) -> Json:
        host, seen = variables["inventory_hostname"], self._hosts(variables)
        if host not in seen or not self.plan:
            return {"changed": False, "reach": [], "front": {}}
        deployed = self.planned["pd_examined"]["deployed"]
        clients = list(variables["groups"]["bench_clients"]) if deployed else []
        ranges = {name: row["host"]["port_range"] for name, row in seen.items()}
        every = doctor_reach.ways(self.plan, clients, ranges, self.planned["pd_examined"]["meet"])
        if deployed:
            own = {name: list(row["found"].get("addresses", [])) for name, row in seen.items()}
            every += doctor_reach.strangers(self.plan, clients, own)
        job = doctor_reach.jobs(every, {name: row["host"]["listeners"] for name, row in seen.items()})[host]
        router = self.plan["router"]["host"]
        asks = deployed and host == (
            router if router in seen else next((name for name in seen if name in self.plan["hosts"]), None)
        )
        if not (job["connect"] or job["listen"] or asks):
            return {"changed": False, "reach": [], "front": {}}
        arguments = {
            "look": "network",
            "job": job,
            "window": _WINDOW_S + _WINDOW_HOST_S * len(seen),
            "state_dir": self.planned["pd_hosts"][host]["state_dir"],
            "plan": self.plan if asks else {},
            # Whether somebody measures is known by the router's host alone: without it, nothing is sent into the load.
            "requests": router in seen and not self._holder(variables),
            "pair_timeout": _PAIR_S,
        }
        asked = time.time()
        return {**self._call(arguments, variables), "asked": asked, "answered": time.time()}

    def _holder(self, variables: Json) -> Json:
        """Who is changing or measuring the deployment; {} when nobody is, or only a command that is dead."""
        router = variables["groups"]["router"][0]
        holder: Json = variables["hostvars"][router].get("__pd_found", {}).get("holder") or {}
        dead = holder and deployed.dead(holder, self.planned["pd_owner"], self.planned["pd_live_pids"])
        return {} if dead else holder

    # -- on the controller

    def _seen(self, variables: Json) -> Seen:
        rows = {host: variables["hostvars"][host].get("__pd_found", {}) for host in variables["ansible_play_hosts_all"]}
        seen = self._hosts(variables)
        reached = {host: variables["hostvars"][host].get("__pd_reached", {}) for host in seen}
        timed = {host: row for host, row in reached.items() if "network_s" in row}
        spans = {host: (row["answered"] - row["network_s"], row["asked"] + row["reach_s"]) for host, row in timed.items()}
        front: Json = next((row["front"] for row in reached.values() if row.get("front")), {})
        lost = {host: row["lost"] for host, row in {**rows, **reached}.items() if row.get("lost")}
        clocks = {
            host: (row["host"]["now"] - (row["asked"] + row["answered"]) / 2, (row["answered"] - row["asked"]) / 2)
            for host, row in seen.items()
        }
        installs = {
            host: [file for row in entry.get("installs", []) for file in row["requirements"]]
            for host, entry in self.plan.get("hosts", {}).items()
        }
        return Seen(
            plan=self.plan,
            deployed=self.planned["pd_examined"]["deployed"],
            refused=self.planned["pd_examined"]["refused"],
            leaving=self.planned["pd_leaving"],
            hosts={host: row["host"] for host, row in seen.items()},
            unreachable=lost,
            settings=self.planned["pd_hosts"],
            accelerated=self.planned["pd_accelerators"],
            reach=doctor_reach.heard({host: row["reach"] for host, row in reached.items() if "reach" in row}, spans),
            front={**front, "busy": self._holder(variables)} if front else {},
            wheel_cuda={host: wheel_cuda(files) for host, files in installs.items()},
            clocks=clocks,
            probe=self._probe(),
        )

    def _probe(self) -> Json:
        """What the last KV path probe of this inventory left on the controller; {} where another's was the last."""
        path = ROOT / str(self.planned["pd_settings"]["results_dir"]) / "kv_probe.json"
        try:
            found: Json = json.loads(path.read_text()) if self.plan.get("kv_probe") or not self.plan.get("emulated") else {}
        except (OSError, ValueError):
            return {}
        wanted = {
            "schema": 1,
            "inventory": self.planned["pd_examined"]["inventory"],
            "transfer_backend": self.plan.get("transfer_backend"),
        }
        if {name: found.get(name) for name in wanted} != wanted:
            return {}
        own = {(pair["prefill"], pair["decode"]) for pair in self.plan.get("pairs", [])}
        for kind in ("paths", "known"):
            found[kind] = [row for row in found[kind] if (row["prefill"].split(" ")[0], row["decode"].split(" ")[0]) in own]
        return found

    def _findings(self, variables: Json) -> Json:
        seen = self._seen(variables)
        findings = doctor.examine(seen)
        said, verdict = doctor.report(findings), doctor.verdict(findings, len(variables["ansible_play_hosts_all"]))
        words = [doctor.table(findings), "", verdict]
        if not self._task.check_mode:
            path = ROOT / str(self.planned["pd_settings"]["results_dir"]) / "doctor.json"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(said, indent=1) + "\n")
            except OSError as error:
                raise AnsibleActionFail(f"cannot write {path}: {error.strerror}; set results_dir") from None
            words.append(f"for programs: {path}")
        display.display("\n" + "\n".join(words) + "\n")
        if not said["ok"]:
            raise AnsibleActionFail(verdict)
        return {"changed": False, "findings": said["findings"]}
