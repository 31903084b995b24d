"""A benchmark run on the client host: started detached, watched, stopped, packed."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from . import processes
from .errors import UserError
from .managers import tail, write
from .reconcile import STEP_S, Outcome, claim
from .units import KEY_FILE

Json = Dict[str, Any]


class Job:
    """One run's folder ``<runs_dir>/<run id>`` and the process that fills it."""

    def __init__(self, state_dir: str, run_id: str):
        self.state_dir, self.run_id = state_dir, run_id
        self.folder = Path(state_dir) / "runs" / run_id

    def running(self) -> List[int]:
        """Return the processes of the run."""
        return [p.pid for p in processes.ours(self.state_dir, f"bench-{self.run_id}")]

    def exit_code(self) -> Optional[int]:
        """Return how the run ended, None while it runs or when it was killed."""
        try:
            return int((self.folder / "exit_code").read_text())
        except (OSError, ValueError):
            return None

    def progress(self) -> Json:
        """Return progress.json, {} before it is there."""
        try:
            return dict(json.loads((self.folder / "progress.json").read_text()))
        except (OSError, ValueError):
            return {}

    def start(self, argv: Sequence[str], plan: Mapping[str, Any], trace: str, api_key: Optional[str], needed_mb: int) -> None:
        """Write the run's inputs and start it; ``trace``: base64 of the trace file, "" without one."""
        claim(self.state_dir)
        free = shutil.disk_usage(self.state_dir).free // 1_000_000
        if free < needed_mb:
            raise UserError(
                f"no room for the run's records: {self.state_dir} has {free} MB free, and {needed_mb} MB are needed "
                "(bench_min_free_mb and what the requests' records take); nothing was started"
            )
        self.folder.mkdir(parents=True)
        write(self.folder / "plan.json", json.dumps(plan, indent=1) + "\n", 0o600)
        if trace:
            (self.folder / "trace.jsonl").write_bytes(base64.b64decode(trace))
        if api_key:
            write(Path(self.state_dir) / KEY_FILE, api_key, 0o600)
        command = [item.replace("{dir}", str(self.folder)) for item in argv]
        marked = processes.work_dir(self.state_dir, f"bench-{self.run_id}")
        Path(marked).mkdir(parents=True, exist_ok=True)
        # The shell outlives the load generator to keep its exit code, whatever becomes of Ansible.
        script = ["/bin/sh", "-c", 'log=$1; code=$2; shift 2; "$@" >"$log" 2>&1; echo $? >"$code"', "run"]
        subprocess.Popen(
            [*script, str(self.folder / "run.log"), str(self.folder / "exit_code"), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=marked,
        )

    def watch(self) -> Outcome:
        """Wait a few seconds for the end; raise UserError when the run could not measure."""
        end, outcome = time.monotonic() + STEP_S, Outcome()
        while time.monotonic() < end and self.exit_code() is None and self.running():
            time.sleep(0.2)
        code = self.exit_code()
        if code is None and self.running():
            outcome.message = self.progress().get("message") or "starting"
            return outcome
        if code not in (0, 3):
            how = "was killed" if code is None else f"ended with exit code {code}"
            raise UserError(f"the load generator {how}. The end of its output:\n{tail(self.folder / 'run.log', 25)}")
        outcome.done = True
        return outcome

    def stop(self, python: str) -> Json:
        """End a run that nobody watches, and make its records readable; return how it was found."""
        code, found = self.exit_code(), self.running()
        if found:
            processes.kill(found[::-1], 20.0)
        if code is None or not (self.folder / "summary.json").exists():
            command = [python, "-m", "pdbench", "run", "--recover", str(self.folder)]
            if Path(python).exists():
                subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        was = "running" if found else ("finished" if code is not None else "killed")
        return {"run_id": self.run_id, "found": was, "exit_code": code}

    def pack(self) -> str:
        """Return the path of an archive of the run."""
        archive = self.folder.with_suffix(".tar.gz")
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            tar.add(self.folder, arcname=self.run_id)
        return str(archive)

    def drop(self) -> None:
        """Remove the run from the client: the controller has it."""
        self.folder.with_suffix(".tar.gz").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def left_over(state_dir: str) -> List[str]:
    """Return the ids of the runs that were never fetched."""
    return sorted(path.name for path in (Path(state_dir) / "runs").glob("*/"))
