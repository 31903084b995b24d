"""A benchmark run on the client host: started detached, watched, stopped, packed."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from . import accounts, keys, processes
from .errors import UserError
from .folders import claim
from .managers import tail, write
from .steps import STEP_S, Outcome

Json = Dict[str, Any]
#: File of a run's folder with the secret by which several clients know each other.
MEET_KEY = "meet.key"
#: What the load generator does without. Nothing of seccomp: its rules are gone through at each system call, which is time.
CONFINED = ("NoNewPrivileges=yes", "CapabilityBoundingSet=", "ProtectSystem=full", "ProtectControlGroups=yes", "UMask=0027")
#: File of a run's folder with the certificates that it trusts, where the router speaks TLS.
ROUTER_CA = "router-ca.pem"


class Job:
    """One run's folder ``<runs_dir>/<run id>`` and the process that fills it."""

    def __init__(self, state_dir: str, run_id: str, user: str = ""):
        """``user``: who the load generator runs as, a service of systemd's; "": who we are, a process of its own session."""
        self.state_dir, self.run_id, self.user = state_dir, run_id, user
        if user:
            os.umask(0o022)
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

    def _after(self) -> str:
        """Return how far what goes after the load generator is, "" when it does not run."""
        try:
            return (self.folder / "tools" / "progress").read_text()
        except OSError:
            return ""

    def start(
        self,
        argv: Sequence[str],
        plan: Mapping[str, Any],
        files: Mapping[str, str],
        secrets: Mapping[str, str],
        needed_mb: int,
        selfcheck: Sequence[str] = (),
        after: Sequence[str] = (),
        meet_key: Optional[str] = None,
    ) -> None:
        """Write the run's inputs and start it.

        ``files``: contents in base64 by their name in the run's folder. ``selfcheck``: a command that goes first, whatever comes of it
        (the gate judges that); ``after``: one that goes last, when the run has measured, and changes nothing of how it ended.
        Neither when empty. ``secrets``: keys by their variable's name. ``meet_key``: what the clients know each other by, where there are several.
        """
        claim(self.state_dir, shared=bool(self.user))
        if self.user:
            accounts.ensure(self.user)
        free = shutil.disk_usage(self.state_dir).free // 1_000_000
        if free < needed_mb:
            raise UserError(
                f"no room for the run's records: {self.state_dir} has {free} MB free, and {needed_mb} MB are needed "
                "(bench_min_free_mb and what the requests' records take); nothing was started"
            )
        self.folder.mkdir(parents=True)
        write(self.folder / "plan.json", json.dumps(plan, indent=1) + "\n", 0o600)
        for name, content in files.items():
            (self.folder / name).write_bytes(base64.b64decode(content))
        if (plan.get("router") or {}).get("tls_ca"):
            write(self.folder / ROUTER_CA, plan["router"]["tls_ca"], 0o644)
        if meet_key:
            write(self.folder / MEET_KEY, meet_key, 0o600)
        for name, key in secrets.items():
            write(Path(self.state_dir) / keys.FILES[name], key, 0o600)
            if self.user:
                accounts.own(Path(self.state_dir) / keys.FILES[name], self.user)
        checking, command, last = (
            [item.replace("{dir}", str(self.folder)) for item in words] for words in (selfcheck, argv, after)
        )
        marked = processes.work_dir(self.state_dir, f"bench-{self.run_id}")
        Path(marked).mkdir(parents=True, exist_ok=True)
        # The shell outlives the load generator to keep its exit code, whatever becomes of Ansible.
        first = f'{shlex.join(checking)} >"$log" 2>&1; ' if checking else ""
        # What it says has a file of its own: the end of run.log is what people are shown.
        then = f'; case $ended in 0|3) {shlex.join(last)} >"${{log%run.log}}after.log" 2>&1;; esac' if last else ""
        script = ["/bin/sh", "-c"]
        script += [f'log=$1; code=$2; shift 2; {first}"$@" >>"$log" 2>&1; ended=$?; echo $ended >"$code"{then}', "run"]
        words = [*script, str(self.folder / "run.log"), str(self.folder / "exit_code"), *command]
        if not self.user:
            quiet: Json = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.Popen(words, start_new_session=True, cwd=marked, **quiet)
            return
        for path in (Path(marked), self.folder, *self.folder.iterdir()):
            accounts.own(path, self.user)
        # A process that we leave behind belongs to the SSH session, with which logind may end it.
        service = ["systemd-run", "--quiet", "--collect", f"--unit=pd-bench-{self.run_id}", f"--uid={self.user}"]
        service += [f"--description=PD load generator, run {self.run_id}"]
        service += [f"--working-directory={marked}", "--property=LimitNOFILE=1048576"]
        service += [f"--property={word}" for word in CONFINED]
        # The sending processes give themselves priority: what they do late, they measure wrong.
        service += ["--property=LimitNICE=-10"]
        done = subprocess.run([*service, "--", *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise UserError(f"the load generator does not start: {done.stderr.strip() or done.stdout.strip()}")
        end = time.monotonic() + 10
        while not self.running() and self.exit_code() is None and time.monotonic() < end:
            time.sleep(0.05)

    def watch(self) -> Outcome:
        """Wait a few seconds for the end; raise UserError when the run could not measure."""
        end, outcome = time.monotonic() + STEP_S, Outcome()
        # The exit code is there before what goes after the load generator.
        while self.running():
            if time.monotonic() >= end:
                outcome.message = self._after() or self.progress().get("message") or "starting"
                return outcome
            time.sleep(0.2)
        code = self.exit_code()
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
                # What the user may write, root must not.
                as_user: Json = {"user": self.user, "extra_groups": []} if self.user else {}
                subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, **as_user)
        was = "running" if found else ("finished" if code is not None else "killed")
        return {"run_id": self.run_id, "found": was, "exit_code": code}

    def pack(self, archive: str) -> None:
        """Write an archive of the run, for the owner of the folder that it goes to."""
        try:
            with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
                tar.add(self.folder, arcname=self.run_id, filter=_nobodys)
            owner = Path(archive).parent.stat()
            if owner.st_uid != os.geteuid():
                os.chown(archive, owner.st_uid, owner.st_gid)
        except OSError as error:
            raise UserError(f"the run cannot be packed: {error.strerror} ({error.filename or archive})") from None

    def drop(self) -> None:
        """Remove the run from the client: the controller has it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(processes.work_dir(self.state_dir, f"bench-{self.run_id}"), ignore_errors=True)


def _nobodys(member: tarfile.TarInfo) -> Optional[tarfile.TarInfo]:
    """Forget who owns the file here: on the controller it belongs to whoever fetches it. What came from there stays behind."""
    if Path(member.name).name in ("dataset.jsonl", "tokenizer.json", MEET_KEY):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def left_over(state_dir: str) -> List[str]:
    """Return the ids of the runs that were never fetched."""
    return sorted(path.name for path in (Path(state_dir) / "runs").glob("*/"))
