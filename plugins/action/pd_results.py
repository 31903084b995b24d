"""Results on the controller: room for them, unpacking, and the report with its verdict."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ansible import context
from ansible.errors import AnsibleActionFail
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "library" / "module_utils"))

from pdlib import manifest, profile_spec, sbom  # noqa: E402

display = Display()


class ActionModule(ActionBase):
    """`pd_results: {action: report, bench: "{{ pd_bench }}"}`; documented in library/pd_results.py."""

    _VALID_ARGS = frozenset({"action", "bench", "run", "draw"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Do the one action on the controller."""
        super().run(tmp, task_vars)
        bench, results = self._task.args["bench"], Path(self._task.args["bench"]["results_dir"])
        if self._task.check_mode:
            return {"changed": False}
        if self._task.args["action"] == "room":
            return self._room(results, bench["needed_mb"])
        if self._task.args["action"] == "unpack":
            return self._unpack(results, self._task.args["run"], bench)
        if self._task.args["action"] == "profile":
            return self._profile(results, bench, task_vars or {})
        return self._report(results, bench, task_vars or {})

    @staticmethod
    def _place(results: Path, run_id: str) -> Path:
        """Return a run's folder; profiles have one of their own, because their figures are no benchmark's."""
        return results / "profiles" / run_id if run_id.startswith(profile_spec.PREFIX) else results / run_id

    @staticmethod
    def _room(results: Path, needed_mb: int) -> dict[str, Any]:
        try:
            (results / ".incoming").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AnsibleActionFail(f"cannot make results_dir {results}: {error.strerror}") from None
        free = shutil.disk_usage(results).free // 1_000_000
        if free < needed_mb:
            raise AnsibleActionFail(
                f"no room for results: {results} has {free} MB free, and {needed_mb} MB are needed "
                "(bench_min_free_mb and what the requests' records take); nothing was started"
            )
        return {"changed": False}

    def _unpack(self, results: Path, run: dict[str, Any], bench: dict[str, Any]) -> dict[str, Any]:
        name, folder = run["run_id"], self._place(results, run["run_id"])
        folder.parent.mkdir(exist_ok=True)
        come = {client: self._opened(results / ".incoming" / client, name) for client in bench["clients"]}
        shares = {client: path for client, path in come.items() if path}
        try:
            if not shares:
                raise AnsibleActionFail(f"no client of {', '.join(come)} has left anything of run {name} behind (reasons above)")
            if len(come) == 1 or not any((path / "share.json").exists() for path in shares.values()):
                next(iter(shares.values())).replace(folder)
            else:
                self._merge(folder, list(come), shares)
        except AnsibleActionFail as error:
            if run["found"] == "watched":
                raise
            display.display(f"  an earlier run that nobody watched is kept as it is: {error}")
            return {"changed": True}
        if run["found"] != "watched":
            code = self._pdbench(["gate", str(folder)]).returncode
            self._pdbench(["report", str(folder)])
            trust = "valid" if code == 0 else "marked as incomplete or invalid"
            display.display(f"  an earlier run that nobody watched ({run['found']}) was fetched to {folder}: {trust}")
        return {"changed": True}

    @staticmethod
    def _opened(incoming: Path, name: str) -> Path | None:
        """Unpack what came from a client and return its folder; None when nothing came."""
        archive = incoming / f"{name}.tar.gz"
        if not archive.exists():
            return None
        shutil.rmtree(incoming / name, ignore_errors=True)
        with tarfile.open(archive) as tar:
            # The client host made the archive: nothing in it may land outside the run's folder.
            for member in tar.getmembers():
                inside = (incoming / member.name).resolve().is_relative_to((incoming / name).resolve())
                if not inside or not (member.isfile() or member.isdir()):
                    raise AnsibleActionFail(f"{archive} holds {member.name}, which no run has; it was not unpacked")
            # Python before 3.11.4 has no filters.
            if hasattr(tarfile, "data_filter"):
                tar.extractall(incoming, filter="data")
            else:
                tar.extractall(incoming)
        archive.unlink()
        return incoming / name

    def _merge(self, folder: Path, clients: list[str], shares: dict[str, Path]) -> None:
        """Keep every client's share below the run's folder, and put them together into it."""
        (folder / "clients").mkdir(parents=True, exist_ok=True)
        for client, path in shares.items():
            path.replace(folder / "clients" / client)
        done = self._pdbench(["merge", str(folder), *(str(folder / "clients" / client) for client in clients)])
        if done.returncode not in (0, 3):
            raise AnsibleActionFail(f"the clients' shares in {folder / 'clients'} make no run: {done.stderr.strip()[-2000:]}")
        (folder / "run.log").write_text(f"\n\n{done.stdout}{done.stderr}")

    @staticmethod
    def python() -> str | None:
        """Return a Python of the controller that has pdbench, None when `make setup` was never run."""
        if importlib.util.find_spec("pdbench") and importlib.util.find_spec("matplotlib"):
            return sys.executable
        own = ROOT / ".venv" / "bin" / "python"
        return str(own) if own.exists() else None

    def _pdbench(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.python()), "-m", "pdbench", *arguments],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def _about(self, task_vars: dict[str, Any], bench: dict[str, Any]) -> dict[str, Any]:
        def git(*words: str) -> str:
            done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
            return done.stdout.strip() if done.returncode == 0 else ""

        plan, hosts = task_vars["__pd_planned"]["pd_plan"], {}
        for host, entry in plan["hosts"].items():
            hosts[host] = {**entry, "found": task_vars["hostvars"][host].get("__pd_found", {}).get("found", {})}
        return {
            "schema": 1,
            "run_id": bench["run_id"],
            "inventory": [str(source) for source in context.CLIARGS.get("inventory") or []],
            "limit": context.CLIARGS.get("subset"),
            "client": ", ".join(bench["clients"]),
            "command": next(iter(bench["clients"].values()))["argv"],
            "max_error_rate": bench["max_error_rate"],
            "versions": {
                "pdbench": version("pdbench") if importlib.util.find_spec("pdbench") else "",
                "ansible-core": version("ansible-core"),
                "python": platform.python_version(),
                "engine": f"{plan['engine']} {plan['engine_version']}",
                "router": f"{plan['router']['name']} {plan['router']['version']}",
            },
            "git": {"commit": git("rev-parse", "HEAD"), "changed_files": git("status", "--porcelain").splitlines()},
            "hosts": hosts,
        }

    def _keep(self, folder: Path, bench: dict[str, Any], task_vars: dict[str, Any]) -> None:
        """Write the manifest and the units' logs into a run's folder."""
        plan, settings = task_vars["__pd_planned"]["pd_plan"], task_vars["__pd_planned"]["pd_settings"]
        about = self._about(task_vars, bench)
        bill = json.dumps(self._bill(plan, settings, about["hosts"]), indent=1) + "\n"
        (folder / sbom.FILE).write_text(bill)
        about["sbom"] = {"file": sbom.FILE, "sha256": hashlib.sha256(bill.encode()).hexdigest()}
        made = manifest.make(plan, settings, about)
        (folder / "manifest.json").write_text(json.dumps(made, indent=1) + "\n")
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        for host in task_vars["ansible_play_hosts_all"]:
            for unit, text in task_vars["hostvars"][host].get("__pd_logs", {}).get("logs", {}).items():
                (logs / f"{host}-{unit}.log").write_text(text + "\n")

    @staticmethod
    def _bill(plan: dict[str, Any], settings: dict[str, Any], hosts: dict[str, Any]) -> dict[str, Any]:
        """What the deployment is made of, from the locks that its virtualenvs were made from."""
        steps = {
            step.split(":", 1)[-1]
            for entry in plan["hosts"].values()
            for row in entry["installs"]
            for step in row["requirements"]
        }
        texts = {step: (ROOT / step).read_text() for step in steps if (ROOT / step).is_file()}
        facts = {host: entry["found"] for host, entry in hosts.items()}
        return sbom.make(plan, facts, texts, settings.get("model_sha256") or "")

    def _profile(self, results: Path, bench: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        folder = self._place(results, bench["run_id"])
        self._keep(folder, bench, task_vars)
        for host in bench["traces"]:
            come = self._opened(results / ".incoming" / host, bench["run_id"])
            for worker in sorted((come / "traces").glob("*")) if come else []:
                # Ranks of one worker come from several hosts.
                shutil.copytree(worker, folder / "traces" / worker.name, dirs_exist_ok=True)
            if come:
                # A host none of whose workers wrote a trace sends an empty archive.
                shutil.rmtree(come, ignore_errors=True)
        read = self._pdbench(["traces", str(folder)])
        display.display("\n" + read.stdout.rstrip() + f"\n\ntraces and figures: {folder}\n")
        if read.returncode:
            raise AnsibleActionFail(f"the profile is not whole; what there is, is kept:\n{read.stderr.strip()[-2000:]}")
        return {"changed": True, "folder": str(folder)}

    def _report(self, results: Path, bench: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        folder = results / bench["run_id"]
        self._keep(folder, bench, task_vars)
        gate = self._pdbench(["gate", str(folder), "--max-error-rate", str(bench["max_error_rate"])])
        drawn = boolean(self._task.args.get("draw", True))
        report = self._pdbench(["report", str(folder)]) if drawn else None
        latest = results / "latest"
        fresh = results / ".latest"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(bench["run_id"])
        fresh.replace(latest)
        table = (folder / "run.log").read_text() if (folder / "run.log").exists() else ""
        table = table[table.rfind("\n\n") + 1 :] if "\n\n" in table else table
        display.display("\n" + "\n".join([table.rstrip(), "", gate.stdout.rstrip(), gate.stderr.rstrip()]))
        if report and report.returncode:
            raise AnsibleActionFail(f"the report could not be made:\n{report.stderr.strip()[-2000:]}")
        compared, problem = self._peer(folder, bench)
        if compared:
            display.display("\n" + compared)
        if drawn:
            display.display(f"\nreport: {folder / 'report.html'}    (results/latest points to it)\n")
        if gate.returncode == 3:
            raise AnsibleActionFail(f"the run is INVALID (reasons above and in {folder / 'validity.json'}); its records are kept")
        if gate.returncode:
            raise AnsibleActionFail(f"the gate could not judge the run:\n{gate.stderr.strip()[-2000:]}")
        if problem:
            raise AnsibleActionFail(f"the run is valid and kept, but bench_tool has no figures to put beside it: {problem}")
        return {"changed": True, "folder": str(folder)}

    def _peer(self, folder: Path, bench: dict[str, Any]) -> tuple[str, str]:
        """Return another bench client's figures beside ours, and what went wrong with it; both empty without one."""
        if not any(client["after"] for client in bench["clients"].values()):
            return "", ""
        shown = self._pdbench(["peer", str(folder)])
        if shown.stdout.strip():
            failed = [line for line in shown.stdout.splitlines() if ": load point " in line]
            return shown.stdout.rstrip(), "; ".join(failed) if shown.returncode else ""
        log = folder / "after.log"
        said = log.read_text(encoding="utf-8", errors="replace").strip() if log.exists() else "it was never started"
        return "", said[-1000:] or "it said nothing"
