"""Move real bytes with the transfer engine between two hosts; runs on both, in the Python and environment of their workers.

Stdlib only, and nothing of this package: the file is written to the host as it is (probe_host.py). What a worker of the engine has
is imported inside: nixl, mooncake, and torch for GPU memory. The task comes as JSON on standard input (it holds a token); how far it
is goes into ``progress`` (a JSON file, replaced atomically).

One end waits (``mode: wait``) at a control port of its own, the other (``mode: move``) comes to it, pair by pair. Every pair has a
process of its own on either side, forked: what an engine logs, holds or breaks ends with it. The control connection carries
JSON lines; bytes that are measured go by the engine alone. Only one pair at a time uses a host (``turn``, a locked file).
"""

from __future__ import annotations

import base64
import ctypes
import fcntl
import hashlib
import hmac
import importlib
import json
import mmap
import os
import re
import select
import signal
import socket
import statistics
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

Json = Dict[str, Any]
#: Bytes of the transfer that is timed for GB/s, of the one that says how long that may take, and of the one timed for latency.
LARGE, MEDIUM, SMALL = 64 << 20, 4 << 20, 4 << 10
#: Seconds: for the large transfers of a pair together, for the small ones, for one transfer, and for all of a pair.
LARGE_S, SMALL_S, ONE_S, PAIR_S = 1.0, 0.5, 15.0, 45.0
#: Lines of the engines' logs that say which way the bytes went, or why not.
TELLING = re.compile(
    r"transport|HCA|RDMA|NVLink|device|fail|error|warn|refused|GID|mlx|unreachable|timed? ?out|denied|cannot|memlock",
    re.IGNORECASE,
)
_GLOG = re.compile(r"^([IWEF])\d{4} \S+ +\d+ ")
_SCOPES = ("self", "intra-node", "inter-node")


class Failed(Exception):
    """A pair that did not work: ``kind`` says at what, ``there`` whether at the other end."""

    def __init__(self, kind: str, text: str, there: bool = False, evidence: Optional[List[str]] = None):
        super().__init__(text)
        self.kind, self.there, self.evidence = kind, there, evidence or []


# ---------------------------------------------------------------- memory


class HostMemory:
    """Bytes of the host's memory."""

    kind, device = "DRAM", 0

    def __init__(self, size: int):
        self.map, self.size = mmap.mmap(-1, size), size
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def fill(self, data: bytes) -> None:
        """Put ``data`` at the start."""
        self.map[: len(data)] = data

    def clear(self, size: int) -> None:
        """Make the first bytes zero."""
        self.fill(bytes(size))

    def digest(self, size: int) -> str:
        """Return the sha256 of the first bytes."""
        return hashlib.sha256(memoryview(self.map)[:size]).hexdigest()


class GpuMemory:
    """Bytes of a GPU's memory; ``device`` counts among the GPUs that the worker sees."""

    kind = "VRAM"

    def __init__(self, size: int, device: int):
        import torch

        self.torch, self.device, self.size = torch, device, size
        torch.cuda.set_device(device)
        pool = mooncake_pool(torch, device)
        if pool is None:
            self.tensor = torch.zeros(size, dtype=torch.uint8, device=f"cuda:{device}")
        else:
            with torch.cuda.use_mem_pool(pool):
                self.tensor = torch.zeros(size, dtype=torch.uint8, device=f"cuda:{device}")
        torch.cuda.synchronize(device)
        self.address = int(self.tensor.data_ptr())

    def fill(self, data: bytes) -> None:
        """Put ``data`` at the start."""
        self.tensor[: len(data)].copy_(self.torch.frombuffer(bytearray(data), dtype=self.torch.uint8))
        self.torch.cuda.synchronize(self.device)

    def clear(self, size: int) -> None:
        """Make the first bytes zero."""
        self.tensor[:size].zero_()
        self.torch.cuda.synchronize(self.device)

    def digest(self, size: int) -> str:
        """Return the sha256 of the first bytes."""
        self.torch.cuda.synchronize(self.device)
        return hashlib.sha256(self.tensor[:size].cpu().numpy().tobytes()).hexdigest()


def mooncake_pool(torch: Any, device: int) -> Any:
    """Return the memory pool that SGLang takes its KV cache from for some of Mooncake's transports, None for the ordinary one."""
    name = os.environ.get("SGLANG_MOONCAKE_CUSTOM_MEM_POOL", "")
    allocators = {"NVLINK": "NVLinkAllocator", "TRUE": "NVLinkAllocator", "BAREX": "BarexAllocator"}
    if name.upper() not in allocators:
        return None
    module: Any = importlib.import_module("mooncake.allocator")
    allocator = getattr(module, allocators[name.upper()]).get_allocator(f"cuda:{device}")
    with torch.cuda.device(device):
        return torch.cuda.MemPool(allocator.allocator())


def memory(task: Json) -> Any:
    """Return the memory of an end: a GPU's where its worker has one."""
    return HostMemory(LARGE) if task["gpu"] is None else GpuMemory(LARGE, task["gpu"])


# ---------------------------------------------------------------- engines


class Nixl:
    """NIXL, set up as the engines do it."""

    module = "nixl._api"

    def __init__(self, task: Json, mem: Any):
        api: Any = importlib.import_module(self.module)
        self.mem, self.peer, self.handles = mem, "", {}  # type: Any, Any, Dict[Tuple[str, int], Any]
        self.name = os.environ.get("SGLANG_DISAGGREGATION_NIXL_BACKEND", "UCX")
        options = json.loads(os.environ.get("SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS", "{}"))
        devices = ib_devices(task)
        if self.name == "UCX" and devices and not os.environ.get("UCX_NET_DEVICES"):
            options.setdefault("device_list", ", ".join(name.strip() for name in devices.split(",")))
        self.agent = api.nixl_agent(str(uuid.uuid4()), api.nixl_agent_config(backends=[]))
        self.agent.create_backend(self.name, options)
        self.agent.register_memory([(mem.address, mem.size, mem.device, "")], mem.kind)

    def meta(self) -> Json:
        """Return what the other end needs."""
        agent = base64.b64encode(self.agent.get_agent_metadata()).decode()
        return {"agent": agent, "address": self.mem.address, "device": self.mem.device, "kind": self.mem.kind}

    def join(self, meta: Json) -> None:
        """Take the other end's ``meta``."""
        self.there = meta
        self.peer = self.agent.add_remote_agent(base64.b64decode(meta["agent"]))

    def transfer(self, op: str, size: int) -> None:
        """Write to the other end, or read from there; return when it is done."""
        if (op, size) not in self.handles:
            here = self.agent.get_xfer_descs([(self.mem.address, size, self.mem.device)], self.mem.kind)
            there = self.agent.get_xfer_descs([(self.there["address"], size, self.there["device"])], self.there["kind"])
            self.handles[op, size] = self.agent.initialize_xfer(op.upper(), here, there, self.peer)
        handle, end = self.handles[op, size], time.monotonic() + ONE_S
        state = self.agent.transfer(handle)
        while state == "PROC":
            state = self.agent.check_xfer_state(handle)
            if time.monotonic() > end:
                raise Failed("transfer", f"{size} bytes did not arrive within {ONE_S:.0f} s")
        if state != "DONE":
            raise Failed("transfer", f"NIXL's transfer ended as {state}")


class Mooncake:
    """Mooncake's transfer engine, set up as SGLang does it."""

    module = "mooncake.engine"

    def __init__(self, task: Json, mem: Any):
        api: Any = importlib.import_module(self.module)
        self.mem, self.engine = mem, api.TransferEngine()
        forced = os.environ.get("MC_FORCE_TCP") == "1"
        protocol, devices = os.environ.get("MOONCAKE_PROTOCOL", "rdma"), "" if forced else ib_devices(task)
        code = self.engine.initialize(task["address"], "P2PHANDSHAKE", protocol, devices)
        if code:
            raise Failed("engine", f"TransferEngine.initialize({task['address']!r}, {protocol!r}, {devices!r}) returned {code}")
        code = self.engine.register_memory(mem.address, mem.size)
        if code:
            raise Failed("memory", f"Mooncake's register_memory of {mem.size} bytes returned {code}")

    def meta(self) -> Json:
        """Return what the other end needs."""
        return {"port": self.engine.get_rpc_port(), "address": self.mem.address}

    def join(self, meta: Json, at: str = "") -> None:
        """Take the other end's ``meta``; ``at``: its host's address."""
        self.session, self.there = f"[{at}]:{meta['port']}" if ":" in at else f"{at}:{meta['port']}", meta["address"]

    def transfer(self, op: str, size: int) -> None:
        """Write to the other end, or read from there; return when it is done."""
        call = self.engine.transfer_sync_write if op == "write" else self.engine.transfer_sync_read
        code = call(self.session, self.mem.address, self.there, size)
        if code:
            raise Failed("transfer", f"Mooncake's transfer of {size} bytes returned {code}")


ENGINES: Dict[str, Any] = {"nixl": Nixl, "mooncake": Mooncake, "mooncake_tcp": Mooncake}


def ib_devices(task: Json) -> str:
    """Return the RDMA devices of the end's GPU: SGLang's flag is a list, a map by GPU, or a file that has one."""
    text = str(task.get("ib_device") or "").strip()
    if text.endswith(".json"):
        text = Path(text).read_text().strip()
    if not text.startswith("{"):
        return text
    found = {str(key): str(value).strip() for key, value in json.loads(text).items()}
    key = str(task["gpu"] or 0)
    if key not in found:
        raise Failed("device", f"disaggregation-ib-device has no device for GPU {key}: {text}")
    return found[key]


def set_up(task: Json) -> Tuple[Any, Any]:
    """Return the memory and the engine of an end."""
    try:
        mem = memory(task)
    except Failed:
        raise
    except Exception as error:
        raise Failed("gpu" if task["gpu"] is not None else "memory", said(error)) from error
    try:
        return mem, ENGINES[task["backend"]](task, mem)
    except Failed:
        raise
    except ImportError as error:
        raise Failed("import", said(error)) from error
    except Exception as error:
        raise Failed("engine", said(error)) from error


def preload(task: Json) -> None:
    """Import what takes long, once for all pairs: torch, which NIXL may ask for its CUDA version, too.

    The engines themselves are imported by the pairs: nothing here may start CUDA, which does not survive a fork.
    """
    if task["gpu"] is not None or ENGINES[task["backend"]] is Nixl:
        try:
            importlib.import_module("torch")
        except Exception as error:
            # A pair that needs it says so.
            print(f"torch: {said(error)}", file=sys.stderr, flush=True)
    task["versions"] = installed()


def installed() -> Json:
    """Return the versions of the transfer engines' packages, as their folders are named; importlib.metadata opens every package."""
    found: Json = {}
    for folder in sys.path:
        for path in [*Path(folder or ".").glob("nixl*.dist-info"), *Path(folder or ".").glob("mooncake*.dist-info")]:
            name, _, version = path.name[: -len(".dist-info")].partition("-")
            found.setdefault(name, version)
    return found


def said(error: BaseException) -> str:
    """Return an exception in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, (Failed, OSError)) else f"{type(error).__name__}: {text}"


# ---------------------------------------------------------------- logs


def log_here(folder: str, name: str) -> List[Path]:
    """Send what this process and its engines say to files of its own; return them."""
    out, ucx = Path(folder) / f"{name}.log", Path(folder) / f"{name}.ucx"
    handle = os.open(str(out), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    ucx.unlink(missing_ok=True)
    os.environ.pop("MC_LOG_DIR", None)
    # UCX has the tables that say which transport it takes; Mooncake says it at its start.
    os.environ.update({"UCX_PROTO_INFO": "y", "UCX_LOG_FILE": str(ucx), "MC_LOG_LEVEL": "INFO", "GLOG_minloglevel": "0"})
    os.environ.setdefault("MC_TRANSFER_TIMEOUT", str(int(ONE_S)))
    return [out, ucx]


def log_files(folder: str, name: str) -> List[Path]:
    """Return the files that :func:`log_here` named."""
    return [Path(folder) / f"{name}.log", Path(folder) / f"{name}.ucx"]


def flush() -> None:
    """Write out what UCX has of its log in stdio's buffers: the tables of the last protocols, which are the ones that count."""
    ctypes.CDLL(None).fflush(None)


def evidence(files: Sequence[Path]) -> List[str]:
    """Return the lines of the logs that tell: rows of UCX's tables of protocols, transports, faults."""
    found: List[str] = []
    for file in files:
        try:
            lines = file.read_text(errors="replace").splitlines()
        except OSError:
            continue
        scope = what = ""
        for line in lines:
            cells = [" ".join(cell.split()) for cell in line.split("|")[1:-1]]
            if len(cells) == 1 and "cfg#" in cells[0]:
                # "<agent> inter-node cfg#1"; then what the table is of, then its rows
                scope, what = next((word for word in _SCOPES if word in cells[0].split()), "other"), ""
            elif len(cells) == 1:
                what = cells[0]
            elif len(cells) == 3 and cells[0].endswith("inf") and ("remote memory" in what or scope != "self"):
                # The rows of the largest transfers: that is what a KV cache is.
                found.append(f"UCX {scope}: {what}: {cells[0]}: {cells[1]}: {cells[2]}")
            elif not cells and TELLING.search(line):
                found.append(_GLOG.sub(r"\1 ", line).strip()[:300])
    kept = list(dict.fromkeys(found))
    return kept if len(kept) <= 30 else kept[:10] + kept[-20:]


# ---------------------------------------------------------------- control


class Control:
    """JSON lines over the control connection."""

    def __init__(self, sock: socket.socket):
        self.sock, self.lines = sock, sock.makefile("r", encoding="utf-8")

    def send(self, **message: Any) -> None:
        """Send one line."""
        self.sock.sendall((json.dumps(message) + "\n").encode())

    def receive(self, timeout_s: float) -> Json:
        """Return the next line; raise Failed when the other end said what is wrong with it, or ended."""
        self.sock.settimeout(timeout_s)
        try:
            line = self.lines.readline()
        except socket.timeout:
            raise Failed("silent", f"no word for {timeout_s:.0f} s", there=True) from None
        except OSError as error:
            raise Failed("ended", said(error), there=True) from None
        if not line:
            raise Failed("ended", "it ended", there=True)
        message: Json = json.loads(line)
        if "error" in message:
            raise Failed(message["kind"], message["error"], there=True, evidence=message["evidence"])
        return message


def lock(path: str) -> Any:
    """Wait for the host's turn; it is given back with the file."""
    file = open(path, "a")  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


# ---------------------------------------------------------------- the end that waits


def wait(task: Json) -> int:
    """Serve pairs until nobody comes any more."""
    family = socket.AF_INET6 if ":" in task["listen"] else socket.AF_INET
    with socket.create_server((task["listen"], 0), family=family, backlog=128) as server:
        progress(task, state="listening", port=server.getsockname()[1])
        preload(task)
        server.settimeout(task["idle_s"])
        while True:
            try:
                sock, _ = server.accept()
            except socket.timeout:
                return 0
            with sock:
                one_comes(task, sock)


def one_comes(task: Json, sock: socket.socket) -> None:
    """Serve one pair in a process of its own, and say so when that dies."""
    control = Control(sock)
    try:
        asked = control.receive(10.0)
    except (Failed, ValueError):
        return
    if not hmac.compare_digest(str(asked.get("token", "")).encode(), task["token"].encode()):
        return
    name = f"{task['id']}-wait"
    with lock(task["turn"]):
        child = os.fork()
        if child == 0:
            try:
                serve_pair(task, control, log_here(task["folder"], name))
            finally:
                os._exit(0)
        status, end = None, time.monotonic() + PAIR_S + 15
        while status is None and time.monotonic() < end:
            time.sleep(0.02)
            pid, code = os.waitpid(child, os.WNOHANG)
            status = code if pid else None
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if status != 0:
        text = f"not done after {PAIR_S + 15:.0f} s" if status is None else died(status)
        try:
            control.send(error=text, kind="died", evidence=evidence(log_files(task["folder"], name)))
        except OSError:
            pass


def died(status: int) -> str:
    """Return how a process ended that said nothing."""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return f"the process was ended by signal {number}" if number else f"the process ended with code {os.WEXITSTATUS(status)}"


def serve_pair(task: Json, control: Control, files: Sequence[Path]) -> None:
    """Do what the other end asks for, and report what is wrong here."""
    try:
        control.send(turn=True)
        mem, engine = set_up(task)
        control.send(ready=engine.meta(), versions=task["versions"])
        while True:
            asked = control.receive(PAIR_S)
            if asked["do"] == "clear":
                mem.clear(asked["size"])
                control.send(done=True)
            elif asked["do"] == "fill":
                mem.fill(os.urandom(asked["size"]))
                control.send(sha256=mem.digest(asked["size"]))
            elif asked["do"] == "digest":
                flush()
                control.send(sha256=mem.digest(asked["size"]), evidence=evidence(files))
            else:
                return
    except Failed as failure:
        if not failure.there:
            control.send(error=str(failure), kind=failure.kind, evidence=evidence(files))
    except OSError:
        # The other end is gone, and has said why.
        return
    except Exception as error:
        control.send(error=said(error), kind="engine", evidence=evidence(files))


# ---------------------------------------------------------------- the end that comes


def move(task: Json) -> int:
    """Try every pair of the task, one after the other."""
    results: List[Json] = []
    progress(task, state="running", message="starting", results=results)
    preload(task)
    for pair in task["pairs"]:
        results.append({"pair": pair["id"], **attempt(task, pair, results)})
        progress(task, state="running", message=f"{len(results)} of {len(task['pairs'])} pairs", results=results)
    progress(task, state="done", message="", results=results)
    return 0


def attempt(task: Json, pair: Json, results: List[Json]) -> Json:
    """Return what became of one pair, whose process may die or hang."""
    name = f"{task['id']}-{pair['id']}"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            move_pair(task, pair, Stages(write), log_here(task["folder"], name))
        finally:
            os._exit(0)
    os.close(write)
    stage, text, found, turned = "starting", b"", None, False  # type: str, bytes, Optional[Json], bool
    end = time.monotonic() + task["patience_s"]
    with os.fdopen(read, "rb", buffering=0) as pipe:
        while found is None:
            ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
            got = pipe.read(65536) if ready else b""
            if not got:
                break
            *lines, text = (text + got).split(b"\n")
            for message in map(json.loads, lines):
                found = message.get("result", found)
                if "stage" in message:
                    stage = message["stage"]
                    progress(task, state="running", message=f"{pair['name']}: {stage}", results=results)
                if message.get("turn"):
                    turned = True
                    end = time.monotonic() + PAIR_S
    if found is None:
        kind = "died" if ready else "timeout"
        if not ready:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        limit = f"not done after {PAIR_S:.0f} s" if turned else f"no turn within {task['patience_s']:.0f} s: other paths hang"
        error = died(status) if ready else limit
        # What hangs is the end that is waited for.
        there = not ready and turned and stage.endswith("at the other end")
        found = {"kind": kind, "error": error, "there": there, "evidence_there": []}
    else:
        os.waitpid(child, 0)
    return {"stage": stage, "evidence": evidence(log_files(task["folder"], name)), **found}


class Stages:
    """What a pair's process tells the one that started it."""

    def __init__(self, handle: int):
        self.handle = handle

    def say(self, **message: Any) -> None:
        """Send one line."""
        data = (json.dumps(message) + "\n").encode()
        while data:
            data = data[os.write(self.handle, data) :]


def move_pair(task: Json, pair: Json, stages: Stages, files: Sequence[Path]) -> None:
    """Try one pair, and say what became of it."""
    try:
        result = run_pair(task, pair, stages)
    except Failed as failure:
        result = {"kind": failure.kind, "error": str(failure), "there": failure.there, "evidence_there": failure.evidence}
    except Exception as error:
        result = {"kind": "engine", "error": said(error), "there": False, "evidence_there": []}
    flush()
    stages.say(result=result)


def connect(task: Json, pair: Json) -> socket.socket:
    """Return the control connection; raise Failed with what kind of obstacle there is."""
    where = f"{pair['address']} port {pair['port']}"
    try:
        return socket.create_connection((pair["address"], pair["port"]), timeout=task["connect_s"])
    except socket.gaierror as error:
        raise Failed("name", f"{pair['address']}: {error.strerror}") from None
    except socket.timeout:
        raise Failed("silence", f"no answer from {where} within {task['connect_s']:.0f} s") from None
    except ConnectionRefusedError:
        raise Failed("refused", f"{where} refuses connections") from None
    except OSError as error:
        raise Failed("route", f"{where}: {error.strerror or error}") from None


def run_pair(task: Json, pair: Json, stages: Stages) -> Json:
    """Return sizes, speed, latency and checksums of one pair."""
    stages.say(stage="waits for its turn")
    # Hosts are taken in the order of their names, so that no two pairs wait for each other.
    turn = lock(task["turn"]) if task["host"] < pair["host"] else None
    stages.say(stage=f"connects to {pair['address']}")
    with connect(task, pair) as sock:
        control = Control(sock)
        stages.say(stage="waits for its turn")
        control.send(token=pair["token"], pair=pair["id"])
        control.receive(task["patience_s"])
        turn = lock(task["turn"]) if task["host"] > pair["host"] else turn
        stages.say(stage=f"sets {task['backend']} up", turn=True)
        mem, engine = set_up(task)
        stages.say(stage=f"waits for {task['backend']} at the other end")
        there = control.receive(PAIR_S)
        if isinstance(engine, Mooncake):
            engine.join(there["ready"], pair["address"])
        else:
            engine.join(there["ready"])
        stages.say(stage="connects the transfer engines")
        op = task["op"]
        figures = measure(op, mem, engine, control, stages.say)
        control.send(do="end")
    if turn is not None:
        turn.close()
    return {"kind": "", "error": "", "there": False, **figures, "versions": task["versions"], "versions_there": there["versions"]}


def measure(op: str, mem: Any, engine: Any, control: Control, say: Callable[..., None]) -> Json:
    """Return what the pair does: latency and speed, with the checksums on either side."""

    def timed(size: int) -> float:
        began = time.perf_counter()
        engine.transfer(op, size)
        return time.perf_counter() - began

    def ask(**what: Any) -> Json:
        control.send(**what)
        return control.receive(PAIR_S)

    timed(SMALL)
    say(stage="times small transfers")
    small, end = [timed(SMALL)], time.monotonic() + SMALL_S
    while len(small) < 200 and time.monotonic() < end:
        small.append(timed(SMALL))
    timed(MEDIUM)
    estimate = timed(MEDIUM)
    # On a slow path less is moved: some five times as long as is measured, at most.
    size = min(LARGE, max(MEDIUM, int(MEDIUM * 5 * LARGE_S / estimate) // MEDIUM * MEDIUM))
    say(stage=f"times transfers of {size >> 20} MiB")
    # What is compared is what was there before the first of these, which no earlier transfer can have left.
    if op == "write":
        mem.fill(os.urandom(size))
        sent = mem.digest(size)
        ask(do="clear", size=size)
    else:
        sent = ask(do="fill", size=size)["sha256"]
        mem.clear(size)
    large, end = [timed(size)], time.monotonic() + LARGE_S
    while len(large) < 64 and time.monotonic() < end:
        large.append(timed(size))
    say(stage="compares the contents")
    answer = ask(do="digest", size=size)
    received = answer["sha256"] if op == "write" else mem.digest(size)
    return {
        "gb_s": size * len(large) / sum(large) / 1e9, "latency_us": statistics.median(small) * 1e6, "bytes": size,
        "transfers": len(large), "sha256_sent": sent, "sha256_received": received, "memory": mem.kind,
        "evidence_there": answer["evidence"],
    }  # fmt: skip


# ---------------------------------------------------------------- the program


def progress(task: Json, **state: Any) -> None:
    """Say how far it is, atomically."""
    path = Path(task["progress"])
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(state))
    # A container's root writes it, and who deploys reads it; it holds no token.
    fresh.chmod(0o644)
    os.replace(fresh, path)


def read_json(path: Path) -> Optional[Json]:
    """Return what a JSON file has, None while it is not there."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def main() -> int:
    """Do the task on standard input."""
    task = json.loads(sys.stdin.read())
    os.umask(0o077)
    try:
        return {"wait": wait, "move": move}[task["mode"]](task)
    except OSError as error:
        progress(task, state="error", message=said(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
