"""Models on a host: whether they are whole, and the program that fetches what is missing (model_tool.py)."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from . import accounts, model_tool, processes
from .errors import UserError
from .folders import claim
from .managers import tail, write
from .model_tool import read_json
from .steps import STEP_S, Outcome

Json = Dict[str, Any]


class Model:
    """One model on this host, and the program that works on it (one at a time)."""

    def __init__(self, path: str, name: str, state_dir: str):
        self.root, self.name, self.state_dir = Path(path), name, state_dir
        self.work = Path(processes.work_dir(state_dir, "model-" + hashlib.sha256(path.encode()).hexdigest()[:8]))
        self.progress = self.work / "progress.json"

    def manifest(self) -> Path:
        """Return where the checksums stand: beside the model, or with our records where that may not be written."""
        beside = self.root.with_name(f"{self.root.name}.pd.json")
        # A folder that is not there yet is made by us.
        return (
            beside
            if beside.exists() or not self.root.exists() or os.access(self.root.parent, os.W_OK)
            else self.work / "manifest.json"
        )

    def known(self) -> Optional[Json]:
        """Return the manifest if it holds for the files as they are."""
        manifest = read_json(self.manifest())
        return manifest if manifest and model_tool.known(self.root, manifest) else None

    # -- the program

    def start(self, key: str, task: Json, python: str, user: str = "") -> None:
        """Start the program on a task; ``key`` says which, so that the next step knows it again."""
        self.stop()
        claim(self.state_dir, shared=bool(user))
        self.work.mkdir(parents=True, exist_ok=True)
        script = self.work / "model_tool.py"
        write(script, inspect.getsource(model_tool), 0o644)
        self.progress.unlink(missing_ok=True)
        if user:
            accounts.ensure(user)
            accounts.own(self.work, user)
        common = {"path": str(self.root), "manifest": str(self.manifest()), "progress": str(self.progress)}
        with open(self.work / "log", "wb") as log:
            process = subprocess.Popen(
                [python, str(script)], stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, cwd=self.work,
                user=user or None, group=accounts.group_of(user) if user else None, extra_groups=[] if user else None,
            )  # fmt: skip
            assert process.stdin is not None
            # It may have died before it read its task: its log, read by the next look, says why.
            with contextlib.suppress(BrokenPipeError), process.stdin as task_in:
                task_in.write(json.dumps({**task, **common}).encode())
        write(self.work / "job.json", json.dumps({"key": key, "pid": process.pid}), 0o600)

    def job(self) -> Tuple[str, bool]:
        """Return the key of the last task, and whether its program runs."""
        job = read_json(self.work / "job.json") or {}
        pid = job.get("pid", 0)
        running = bool(pid) and processes.alive(pid) and any(p.pid == pid for p in processes.ours(self.state_dir, self.work.name))
        return job.get("key", ""), running

    def stop(self) -> None:
        """End the program."""
        processes.kill([p.pid for p in processes.ours(self.state_dir, self.work.name)], 5.0)
        (self.work / "job.json").unlink(missing_ok=True)

    def advance(self, key: str, task: Json, python: str, until: str = "done", user: str = "") -> Json:
        """Bring a task a few seconds further; return its progress, whose ``state`` is ``running`` or ``until``."""
        now, running = self.job()
        if now != key or not (running or (read_json(self.progress) or {}).get("state") == until):
            self.start(key, task, python, user)
        end = time.monotonic() + STEP_S
        while True:
            # In this order: a program that ends between the two questions has said what it did.
            running = self.job()[1]
            said = read_json(self.progress) or {"state": "running", "message": "starting"}
            if said["state"] == "error":
                self.stop()
                raise UserError(f"model {self.name}: {said['message']}")
            if said["state"] == until:
                return said
            if not running:
                self.stop()
                raise UserError(
                    f"model {self.name}: {task['task']} ended without a word. Its log:\n{tail(self.work / 'log', 12)}"
                )
            if time.monotonic() > end:
                return said
            time.sleep(0.1)


def have(model: Model, source: Json, check: bool) -> Tuple[Outcome, Json]:
    """Bring a model closer to being here, whole and with known checksums.

    ``source``: ``kind`` (path, rsync: what is here is checked; hub: it is downloaded, with ``python``, ``revision``,
    ``endpoint`` and ``token``), ``sha256``: what the checksum must be (None: any). Also returns ``problem`` (why it is no
    whole model; only with rsync), ``digest`` and ``bytes``.
    """
    if not check and model.job()[0].startswith("serve "):
        # Left by a deploy that was killed: nobody has its token any more.
        model.stop()
    outcome, nothing = Outcome(done=True), {"problem": model_tool.fault(model.root), "digest": "", "bytes": 0}
    manifest = model.known()
    if manifest is None and nothing["problem"] and source["kind"] == "rsync":
        return outcome, nothing
    if manifest is None and nothing["problem"] and source["kind"] == "path":
        raise UserError(f"model={model.name}: {model.root} {nothing['problem']} (model_source: path)")
    if manifest is None:
        download = bool(nothing["problem"])
        if download and model.root.exists():
            raise UserError(f"model {model.name}: {model.root} {nothing['problem']}; we overwrite no weights: move it away")
        if check:
            outcome.changed.append(f"would {'download' if download else 'make the checksums of'} {model.name}")
            return outcome, {**nothing, "problem": ""}
        task = {"task": "download" if download else "hash", "repo": model.name, "revision": source["revision"]}
        task.update(endpoint=source["endpoint"], token=source["token"])
        key = json.dumps([task["task"], str(model.root), source["revision"], source["endpoint"]])
        said = model.advance(key, task, source["python"])
        if said["state"] != "done":
            outcome.done, outcome.message = False, f"{model.name}: {said['message']}"
            return outcome, nothing
        outcome.changed.append(f"{'downloaded' if download else 'made the checksums of'} {model.name}")
        model.stop()
        manifest = read_json(model.manifest()) or {}
    digest = manifest["digest"]
    if source["sha256"] not in (None, digest) and source["kind"] != "rsync":
        raise UserError(f"model {model.name} in {model.root} has the checksum {digest}, and model_sha256 is {source['sha256']}")
    return outcome, {"problem": "", "digest": digest, "bytes": manifest["bytes"]}


def serve(model: Model, address: str, token: str, idle_s: float, python: str, user: str) -> Tuple[Outcome, Json]:
    """Start to give the model to other hosts; returns ``url`` and ``digest`` when it does."""
    task = {"task": "serve", "address": address, "token": token, "idle_s": idle_s}
    said = model.advance(f"serve {hashlib.sha256(token.encode()).hexdigest()}", task, python, "serving", user)
    if said["state"] != "serving":
        return Outcome(message=f"{model.name}: {said['message']}"), {}
    host = f"[{address}]" if ":" in address else address
    return Outcome(done=True), {"url": f"http://{host}:{said['port']}", "digest": said["digest"]}


def fetch(model: Model, served: Json, token: str, giver: str, size: int, python: str, check: bool) -> Tuple[Outcome, Json]:
    """Copy the model from the host that serves it (``served``: its url and digest)."""
    if check:
        return Outcome(done=True, changed=[f"would copy {model.name} ({size / 1e9:.2f} GB) from {giver}"]), {}
    task = {"task": "fetch", "url": served["url"], "digest": served["digest"], "token": token, "from": giver}
    said = model.advance(json.dumps(["fetch", served["url"], served["digest"]]), task, python)
    if said["state"] != "done":
        return Outcome(message=f"{model.name}: {said['message']}"), {}
    model.stop()
    changed = [f"copied {model.name} ({said['bytes'] / 1e9:.2f} GB) from {giver}"] if said["changed"] else []
    return Outcome(done=True, changed=changed), {"digest": said["digest"], "bytes": said["bytes"]}
