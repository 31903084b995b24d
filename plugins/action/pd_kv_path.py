"""Try the KV path between prefill and decode hosts; draw it, keep it, and stop when it is broken."""

from __future__ import annotations

import json
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.utils.display import Display

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "library" / "module_utils"))
sys.path.insert(0, str(ROOT))

from plugins.action import pd_poll  # noqa: E402

from pdlib import probe, probe_verdict  # noqa: E402

display = Display()


class ActionModule(pd_poll.ActionModule):
    """`pd_kv_path: {action: move, work: "{{ pd_probe }}", ...}`; documented in library/pd_kv_path.py."""

    _VALID_ARGS = frozenset({"action", "work", "state_dir", "service_user", "results_dir"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return ``token`` and ``ports`` (serve), ``results`` (move) or ``kv_probe`` (judge)."""
        super(pd_poll.ActionModule, self).run(tmp, task_vars)
        variables, args = task_vars or {}, self._task.args
        action, work = args["action"], args["work"]
        if action == "judge":
            return self._judge(work, variables)
        if self._task.check_mode:
            return {"changed": False}
        common = {"action": action, "state_dir": args["state_dir"], "service_user": args["service_user"]}
        host = variables["inventory_hostname"]
        if action == "stop":
            return dict(self._execute_module(module_name="pd_probe", module_args=common, task_vars=variables))
        served = self._served(work, variables) if action == "move" else {}
        kind = "moving" if action == "move" else "waiting"
        # Those who come show the tokens of those they come to.
        common |= {"ends": probe.tasks(work, host, kind, served), "token": secrets.token_urlsafe(24) if action == "serve" else ""}
        if not common["ends"]:
            return {"changed": False, "results": []}
        # Longer than the programs themselves wait.
        try:
            result = self.poll("pd_probe", common, variables, work["patience_s"] + 120.0)
        except AnsibleActionFail as error:
            return {"changed": False, "trouble": str(error)}
        if result.get("failed"):
            # The other paths are tried all the same; what is wrong here is part of the verdict.
            return {"changed": False, "trouble": result["msg"]}
        # The token is not to be shown, with however many -v.
        return {**result, "token": common["token"], "_ansible_no_log": True} if action == "serve" else result

    @staticmethod
    def _served(work: dict[str, Any], variables: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """By end, where it waits and for what token."""
        found = {}
        for host in work["waiting"]:
            answer = variables["hostvars"][host]["__pd_probe_served"]
            for name, port in answer.get("ports", {}).items():
                found[name] = {"port": port, "token": answer["token"]}
        return found

    @staticmethod
    def _said(work: dict[str, Any], variables: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """What became of every pair, also where a program could not be started."""
        found: dict[str, dict[str, Any]] = {}
        for pair in work["pairs"]:
            for name, there, register in (("to", True, "__pd_probe_served"), ("from", False, "__pd_probe_moved")):
                trouble = variables["hostvars"][work["ends"][pair[name]]["host"]][register].get("trouble")
                if trouble:
                    found[pair["id"]] = probe_verdict.not_started(trouble, there)
        for host in work["moving"]:
            for row in variables["hostvars"][host]["__pd_probe_moved"].get("results", []):
                found[row["pair"]] = row
        return found

    def _judge(self, work: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        if self._task.check_mode:
            display.display(f"\nwould move bytes over {len(work['pairs'])} paths between prefill and decode\n")
            return {"changed": False}
        said = self._said(work, variables)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        rows, known = [], dict(work["known"])
        for pair in work["pairs"]:
            ends = {name: work["ends"][pair[name]] for name in ("prefill", "decode")}
            labels = {name: probe.label(end) for name, end in ends.items()}
            verdict = probe_verdict.judge(work, pair, said[pair["id"]])
            rows.append({**labels, **verdict, "addresses": {name: end["address"] for name, end in ends.items()}, "when": now})
            known.pop(pair["fingerprint"], None)
            if verdict["ok"]:
                kept = ("gb_s", "latency_us", "seen", "devices", "expected", "ok", "when")
                known[pair["fingerprint"]] = {**labels, **{name: rows[-1][name] for name in kept}}
        earlier = [row for mark, row in work["known"].items() if mark not in {pair["fingerprint"] for pair in work["pairs"]}]
        display.display(f"\nKV path, {work['backend']}:\n{probe.matrix([*rows, *earlier])}\n")
        folder = ROOT / self._task.args["results_dir"]
        folder.mkdir(parents=True, exist_ok=True)
        # The folder of results may be that of several deployments: doctor.yml asks whose this is.
        record = {"schema": 1, "ok": all(row["ok"] for row in rows), "inventory": work["inventory"]}
        record |= {"transfer_backend": work["backend"], "op": work["op"]}
        text = json.dumps({**record, "paths": rows, "known": earlier}, indent=1)
        (folder / "kv_probe.json").write_text(text + "\n")
        bad = [row for row in rows if not row["ok"]]
        if bad and work["mode"] != "report":
            raise AnsibleActionFail(probe_verdict.message(bad, len(rows)))
        if bad:
            display.warning(probe_verdict.message(bad, len(rows)))
        return {"changed": False, "kv_probe": known}
