"""Both ends of the KV path probe as programs on this machine, each with what a test changes in it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Json = dict[str, Any]
PDLIB = Path(__file__).resolve().parents[1] / "library" / "module_utils" / "pdlib"
ADDRESS = "127.0.0.1"
TOKEN = "a token of the test"

#: An engine whose memory is a file, for tests of all that is around one.
FILES = """
import mmap, tempfile
class Memory(tool.HostMemory):
    def __init__(self, size):
        self.size, self.file = size, tempfile.NamedTemporaryFile()
        self.file.truncate(size)
        self.map = mmap.mmap(self.file.fileno(), size)
class Files:
    module = "json"
    def __init__(self, task, mem):
        self.mem = mem
    def meta(self):
        return {"path": self.mem.file.name}
    def join(self, meta):
        self.there = open(meta["path"], "r+b")
    def transfer(self, op, size):
        self.there.seek(0)
        if op == "write":
            self.there.write(self.mem.map[:size])
            self.there.flush()
        else:
            self.mem.map[:size] = self.there.read(size)
tool.memory = lambda task: Memory(tool.LARGE)
tool.ENGINES["nixl"] = Files
tool.LARGE_S = tool.SMALL_S = 0.05
"""


def task(folder: Path, mode: str, backend: str, **more: Any) -> Json:
    """The task of one end, as probe.tasks and probe_host make it."""
    name = "decode-0" if mode == "wait" else "prefill-0"
    return {
        "id": name, "mode": mode, "host": "h2" if mode == "wait" else "h1", "address": ADDRESS, "listen": ADDRESS, "gpu": None,
        "ib_device": "", "backend": backend, "op": "write", "patience_s": 40, "idle_s": 60, "connect_s": 2.0,
        "token": TOKEN if mode == "wait" else "", "folder": str(folder), "turn": str(folder / f"turn-{mode}"),
        "progress": str(folder / f"{name}-{mode}.json"), **more,
    }  # fmt: skip


def pair(port: int, **more: Any) -> Json:
    """One pair of the end that moves."""
    return {"id": "0", "name": "prefill-0 and decode-0", "host": "h2", "address": ADDRESS, "port": port, "token": TOKEN, **more}


class Ends:
    """Starts programs in ``python``; all of them end with :meth:`close`."""

    def __init__(self, folder: Path, python: str = sys.executable, env: Mapping[str, str] | None = None):
        self.folder, self.python, self.env = folder, python, dict(env or os.environ)
        self.started: list[subprocess.Popen[str]] = []

    def start(self, todo: Json, change: str = "", env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start one end; ``change``: code that changes the program, which it knows as ``tool``."""
        code = f"import sys; sys.path.insert(0, {str(PDLIB)!r}); import probe_tool as tool\n{change}\nsys.exit(tool.main())"
        log = open(self.folder / f"{todo['id']}-{len(self.started)}.out", "w")  # noqa: SIM115
        process = subprocess.Popen(
            [self.python, "-c", code], stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, env={**self.env, **(env or {})},
            start_new_session=True,
        )  # fmt: skip
        log.close()
        self.started.append(process)
        assert process.stdin is not None
        with process.stdin as file:
            file.write(json.dumps(todo))
        return process

    def waiting(self, todo: Json, change: str = "", env: Mapping[str, str] | None = None) -> int:
        """Start the end that waits; return its port."""
        self.start(todo, change, env)
        limit = time.monotonic() + 60
        while not Path(todo["progress"]).exists():
            assert time.monotonic() < limit
            time.sleep(0.02)
        return int(json.loads(Path(todo["progress"]).read_text())["port"])

    def moved(self, todo: Json, change: str = "", env: Mapping[str, str] | None = None) -> list[Json]:
        """Run the end that moves; return its results."""
        self.start(todo, change, env).wait(180)
        said = json.loads(Path(todo["progress"]).read_text())
        assert said["state"] == "done", said
        return list(said["results"])

    def run(
        self, backend: str, change: str = "", there: str = "", *,
        env: Mapping[str, str] | None = None, env_there: Mapping[str, str] | None = None, **more: Any,
    ) -> Json:  # fmt: skip
        """Return what becomes of one pair; ``there`` and ``env_there``: change and environment of the end that waits."""
        port = self.waiting(task(self.folder, "wait", backend, **more), there, env_there)
        return self.moved(task(self.folder, "move", backend, pairs=[pair(port)], **more), change, env)[0]

    def close(self) -> None:
        """End what was started, with what it started."""
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
