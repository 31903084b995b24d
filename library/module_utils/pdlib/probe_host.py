"""The ends of the KV path probe on a host: the programs (probe_tool.py) that wait there, and those that go from there."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import pwd
import resource
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, Mapping, Sequence, Tuple

from . import accounts, containers, probe_tool, processes
from .errors import UserError
from .folders import claim
from .managers import tail, write
from .probe_tool import read_json
from .runtimes import client_env, container_name
from .steps import STEP_S, Outcome

Json = Dict[str, Any]
#: The unit, as it were, that the programs belong to: teardown ends what runs in its folder.
UNIT = "kv-probe"
#: How long a program may take to listen, which it does before it imports anything.
_START_S = 60.0


class Probe:
    """The programs of this host. ``user``: who the workers run as under systemd ("": who connects)."""

    def __init__(self, state_dir: str, user: str = ""):
        self.state_dir, self.user = state_dir, user
        self.work = Path(processes.work_dir(state_dir, UNIT))

    def start(self, end: Mapping[str, Any], token: str) -> None:
        """Start the program of one end."""
        task = {**end["task"], "token": token, "folder": str(self.work), "turn": str(self.work / "turn")}
        task["progress"] = str(self._progress(task["id"], task["mode"]))
        name = f"{task['id']}-{task['mode']}"
        command, env = self._command(end, name)
        if self.user:
            # As the workers have it: systemd's units say LimitMEMLOCK=infinity. Under supervisord they have the shell's limit.
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        user = "" if end["container"] else self.user
        with _fresh(self.work / f"{name}.out") as log:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, cwd=self.work, env=env,
                    user=user or None, group=accounts.group_of(user) if user else None, extra_groups=_groups(user) if user else None,
                )  # fmt: skip
            except OSError as error:
                raise UserError(f"{command[0]}: {error.strerror}; the KV path is tried with the workers' own Python") from None
            with _fresh(self.work / f"{name}.pid") as pid:
                pid.write(str(process.pid).encode())
            assert process.stdin is not None
            # It may have died before it read its task: its log, read by the next look, says why.
            with contextlib.suppress(BrokenPipeError), process.stdin as task_in:
                task_in.write(json.dumps(task).encode())

    def _command(self, end: Mapping[str, Any], name: str) -> Tuple[List[str], Dict[str, str]]:
        script, container = str(self.work / "probe_tool.py"), end["container"]
        if container:
            containers.note(self.state_dir, [container["runtime"]])
            mark = container_name(f"{UNIT}-{name}", self.state_dir)
            return in_container(container["argv"], end["python"], mark, str(self.work), script), {
                **os.environ,
                **client_env(end["env"]),
            }
        # A service starts with little; what we run under has more, and some of it (UCX_TLS) would count.
        names = ("PATH", "LANG") if self.user else tuple(os.environ)
        base = {name: os.environ[name] for name in names if name in os.environ}
        home = {"HOME": pwd.getpwnam(self.user).pw_dir} if self.user else {}
        return [end["python"], script], {**base, **home, **end["env"]}

    def _progress(self, name: str, mode: str) -> Path:
        return self.work / f"{name}-{mode}.json"

    def _runs(self, name: str, mode: str) -> bool:
        pid = (self.work / f"{name}-{mode}.pid").read_text()
        return processes.alive(int(pid))

    def ready(self) -> None:
        """Make the folder, with the program in it, anew."""
        if self.user:
            # sudo may have a stricter one, and then the user could not reach what is made here.
            os.umask(0o022)
        claim(self.state_dir, shared=bool(self.user))
        self.work.mkdir(parents=True, exist_ok=True)
        if self.user:
            accounts.ensure(self.user)
            accounts.own(self.work, self.user)
        write(self.work / "probe_tool.py", inspect.getsource(probe_tool), 0o644)

    def serve(self, ends: Sequence[Json], token: str) -> Json:
        """Start the programs that wait; return their ports by end."""
        self.stop()
        self.ready()
        for end in ends:
            self.start(end, token)
        ports: Json = {}
        limit = time.monotonic() + _START_S
        while len(ports) < len(ends):
            for end in ends:
                said = read_json(self._progress(end["task"]["id"], "wait"))
                if said and said["state"] == "listening":
                    ports[end["task"]["id"]] = said["port"]
                elif said or not self._runs(end["task"]["id"], "wait") or time.monotonic() > limit:
                    text = said["message"] if said else self._log(end, "wait")
                    self.stop()
                    raise UserError(f"{end['python']} cannot wait for the KV path's bytes at {end['task']['listen']}: {text}")
            time.sleep(0.05)
        return ports

    def move(self, ends: Sequence[Json], token: str, resumed: bool) -> Tuple[Outcome, List[Json]]:
        """Bring the programs that go from here a few seconds further; return the results of all once they are done."""
        if not resumed:
            self._end_movers()
            self.ready()
            for end in ends:
                self._progress(end["task"]["id"], "move").unlink(missing_ok=True)
                self.start(end, token)
        until = time.monotonic() + STEP_S
        while True:
            # In this order: a program that ends between the two questions has said what it did.
            running = [self._runs(end["task"]["id"], "move") for end in ends]
            states = [read_json(self._progress(end["task"]["id"], "move")) or {} for end in ends]
            if all(state.get("state") == "done" for state in states):
                return Outcome(done=True), [{**row, "end": e["task"]["id"]} for e, s in zip(ends, states) for row in s["results"]]
            for end, state, runs in zip(ends, states, running):
                if state.get("state") != "done" and (state.get("state") == "error" or not runs):
                    raise UserError(f"{end['task']['id']}: {state.get('message') or self._log(end, 'move')}")
            if time.monotonic() > until:
                said = [state["message"] for state in states if state.get("state") == "running" and state.get("message")]
                return Outcome(message="; ".join(said) or "starting"), []
            time.sleep(0.1)

    def _end_movers(self) -> None:
        """End what a deploy that was killed left on its way: it would write its results into ours."""
        old = {int(file.read_text() or 0) for file in self.work.glob("*-move.pid")}
        processes.kill([p.pid for p in processes.ours(self.state_dir, UNIT) if _session(p.pid) in old], 2.0)
        marks = tuple(
            container_name(f"{UNIT}-{file.name[: -len('.pid')]}", self.state_dir) for file in self.work.glob("*-move.pid")
        )
        containers.end({name: client for name, client in containers.ours(self.state_dir).items() if name in marks})

    def _log(self, end: Mapping[str, Any], mode: str) -> str:
        return tail(self.work / f"{end['task']['id']}-{mode}.out", 8) or "it ended without a word"

    def stop(self) -> None:
        """End the programs, and remove what they left."""
        processes.kill([p.pid for p in processes.ours(self.state_dir, UNIT)], 2.0)
        ours = containers.ours(self.state_dir)
        containers.end({name: client for name, client in ours.items() if name.startswith(f"{UNIT}-")})
        shutil.rmtree(self.work, ignore_errors=True)


def _fresh(path: Path) -> BinaryIO:
    """Open a new file for writing: the folder is the service user's, who could have left a link there for root to follow."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb")


def _session(pid: int) -> int:
    """Return a process's session: a program and its children share one."""
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def _groups(user: str) -> List[int]:
    """Return all groups of a user: GPUs and RDMA devices may be open to one of them only."""
    return os.getgrouplist(user, accounts.group_of(user))


def in_container(argv: Sequence[str], python: str, name: str, folder: str, script: str) -> List[str]:
    """Return a worker's container command that runs the probe instead: its image, devices and environment.

    Of our folders the probe gets its own alone (the model may not be there yet); what the user mounts by
    ``engine_container_args`` stays, as a transfer engine may need it. Ours stand before the first ``--env``, the user's after.
    """
    whole = list(argv)
    entry = len(whole) - 1 - whole[::-1].index("--entrypoint")
    first = whole.index("--env") if "--env" in whole[:entry] else entry
    kept: List[str] = []
    ours = iter(whole[:first])
    for word in ours:
        if word == "--mount":
            next(ours)
        elif word in ("--name", "--workdir"):
            next(ours)
            kept += [word, name if word == "--name" else folder]
        else:
            kept.append(word)
    # The image stands after the entrypoint and its value.
    mount = f"type=bind,source={folder},target={folder}"
    own = ["--interactive", "--mount", mount, "--entrypoint", python, whole[entry + 2], script]
    return [*kept, *whole[first:entry], *own]
