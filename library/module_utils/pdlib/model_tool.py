"""Hash, serve, copy and download models; runs on a host as a program of its own, which outlives the module that starts it.

Stdlib only, and nothing of this package: the file is written to the host as it is (models.py). Its task comes as JSON on
standard input (it may hold a token), and how far it is goes into ``progress`` (a JSON file, replaced atomically).
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import http.server
import json
import os
import shutil
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

Json = Dict[str, Any]
_CHUNK = 4 << 20
#: Files at a time; one stream of Python's does about 1 GB/s, and networks of GPU hosts do more.
_STREAMS = 4


class Refused(Exception):
    """What the user must be told; no fault of the program's."""


def files_of(root: Path) -> Dict[str, Path]:
    """Return a model's files by relative name. Hidden ones at the top are left out: `.cache`, `.gitattributes`."""
    found: Dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        if here == root:
            folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = here / name
            if path.is_file() and not (here == root and name.startswith(".")):
                found[path.relative_to(root).as_posix()] = path
    return found


def digest(files: Json) -> str:
    """Return a model's checksum: sha256 of what `sha256sum` prints for its files (`./name`), in the order of `LC_ALL=C sort`."""
    order = sorted(files, key=lambda name: name.encode("utf-8", "surrogateescape"))
    text = "".join(f"{files[name]['sha256']}  ./{name}\n" for name in order)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def fault(root: Path) -> str:
    """Return why a folder is no whole model, as far as sizes and names tell ("" when it is)."""
    if not root.is_dir():
        return "is not there" if not root.exists() else "is no folder"
    names = files_of(root)
    if not any(name == "config.json" or name.endswith(".gguf") for name in names):
        return "has no config.json"
    for name in [name for name in names if name.endswith(".index.json")]:
        try:
            parts = set(json.loads(names[name].read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return f"has a {name} that cannot be read"
        lacking = sorted(parts - set(names))
        if lacking:
            return f"lacks {len(lacking)} of {len(parts)} files of weights, such as {lacking[0]}"
    for name, path in sorted(names.items()):
        if name.endswith(".safetensors") and path.stat().st_size != _safetensors_size(path):
            return f"has a {name} that is cut off"
    return ""


def _safetensors_size(path: Path) -> int:
    """How long a safetensors file must be: 8 bytes, the header, and where the last tensor ends; -1 for no such file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 1 << 30:
                return -1
            header = json.loads(file.read(length))
        return 8 + length + max((row["data_offsets"][1] for name, row in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return -1


def known(root: Path, manifest: Optional[Json]) -> bool:
    """Whether a manifest holds for the files as they are, by names, sizes and times."""
    if not manifest:
        return False
    found, rows = files_of(root), manifest["files"]
    return set(found) == set(rows) and all(_same(found[name], rows[name]) for name in found)


def _same(path: Path, row: Json) -> bool:
    state = path.stat()
    return bool((state.st_size, state.st_mtime_ns) == (row["size"], row.get("mtime_ns")))


class Progress:
    """Says how far a task is, a few times a second at most."""

    def __init__(self, path: str, verb: str, total: int = 0):
        self.path, self.verb, self.total, self.done = Path(path), verb, total, 0
        self.began, self.said, self.lock = time.monotonic(), 0.0, threading.Lock()

    def add(self, count: int) -> None:
        """Count bytes."""
        with self.lock:
            self.done += count
            if time.monotonic() - self.said > 0.5:
                self.say("running", f"{self.verb} {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB{self._rate()}")

    def _rate(self) -> str:
        rate = self.done / max(time.monotonic() - self.began, 1e-3)
        left = (self.total - self.done) / rate if rate else 0
        return f", {rate / 1e6:.0f} MB/s, {left:.0f} s left"

    def say(self, state: str, message: str, **more: Any) -> None:
        """Write the file."""
        self.said = time.monotonic()
        write_json(self.path, {"state": state, "message": message, **more})


def write_json(path: Path, value: Json) -> None:
    """Write a JSON file atomically."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(fresh, path)


def read_json(path: Path) -> Optional[Json]:
    """Return a JSON object, None when there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def blocks(path: Path) -> Iterator[bytes]:
    """Yield a file's content."""
    with path.open("rb") as file:
        while True:
            block = file.read(_CHUNK)
            if not block:
                return
            yield block


def sha256(path: Path, seen: Callable[[int], None]) -> str:
    """Return a file's sha256; ``seen`` is told of every block."""
    result = hashlib.sha256()
    for block in blocks(path):
        result.update(block)
        seen(len(block))
    return result.hexdigest()


def in_parallel(work: Callable[[str], None], names: List[str]) -> None:
    """Do ``work`` for each name, some at a time; the first error ends it."""
    with ThreadPoolExecutor(_STREAMS) as pool:
        tasks = [pool.submit(work, name) for name in names]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            for task in tasks:
                task.cancel()
            raise


def make_manifest(root: Path, manifest: Path, progress: Progress) -> Json:
    """Return the manifest of a model, kept at ``manifest``; only files that changed since are read."""
    before = (read_json(manifest) or {}).get("files", {})
    found = files_of(root)
    rows = {name: before[name] for name, path in found.items() if name in before and _same(path, before[name])}
    progress.total = sum(path.stat().st_size for name, path in found.items() if name not in rows)

    def one(name: str) -> None:
        state = found[name].stat()
        rows[name] = {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": sha256(found[name], progress.add)}

    in_parallel(one, [name for name in found if name not in rows])
    made = {"schema": 1, "digest": digest(rows), "bytes": sum(row["size"] for row in rows.values()), "files": rows}
    if made != read_json(manifest):
        write_json(manifest, made)
    return made


def check_room(folder: Path, needed: int) -> None:
    """Refuse to write what does not fit (1 % of it, and 64 MB, are left free)."""
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed * 1.01 + 64e6 > free:
        raise Refused(f"{folder} needs {needed / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free there; nothing was written")


@contextmanager
def alone(root: Path, progress: Progress) -> Iterator[None]:
    """Only one writes a model at a time: hosts may share the file system."""
    root.parent.mkdir(parents=True, exist_ok=True)
    lock = root.with_name(f"{root.name}.part.lock")
    while True:
        with open(lock, "w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The one before may have taken the file away after we opened it.
                if os.path.exists(lock) and os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                    try:
                        yield
                    finally:
                        lock.unlink(missing_ok=True)
                    return
            except BlockingIOError:
                progress.say("running", "waits for another host that writes it")
        time.sleep(1)


def hash_model(task: Json, progress: Progress) -> Json:
    """Make the manifest."""
    made = make_manifest(Path(task["path"]), Path(task["manifest"]), progress)
    return {"digest": made["digest"], "bytes": made["bytes"]}


# ---------------------------------------------------------------- from host to host


class _Handler(http.server.BaseHTTPRequestHandler):
    """Gives the manifest and single files of one model to who has the token."""

    protocol_version = "HTTP/1.1"
    server: "_Server"

    def do_GET(self) -> None:
        """Answer one request."""
        self.server.last = time.monotonic()
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._text(403, b"no")
        elif self.path == "/manifest":
            self._text(200, json.dumps(self.server.manifest).encode())
        else:
            self._file(urllib.parse.unquote(self.path[1:], errors="surrogateescape"))

    def _text(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, name: str) -> None:
        if name not in self.server.manifest["files"]:
            self._text(404, b"no such file")
            return
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        with (self.server.root / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(max(size - start, 0)))
            self.end_headers()
            while start < size:
                # Not all at once, so that a long file counts as use all the time.
                sent = self.connection.sendfile(file, start, min(64 << 20, size - start))
                if not sent:
                    return
                start += sent
                self.server.last = time.monotonic()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what is asked for shows as progress on the other side."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: str, token: str, root: Path, manifest: Json):
        if ":" in address:
            self.address_family = socket.AF_INET6
        super().__init__((address, 0), _Handler)
        self.token, self.root, self.manifest, self.last = token, root, manifest, time.monotonic()


def serve(task: Json, progress: Progress) -> Json:
    """Give the model to other hosts until nobody asked for ``idle_s`` seconds."""
    root = Path(task["path"])
    manifest = make_manifest(root, Path(task["manifest"]), progress)
    server = _Server(task["address"], task["token"], root, manifest)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    progress.say("serving", "serves", port=server.server_address[1], digest=manifest["digest"], bytes=manifest["bytes"])
    while time.monotonic() - server.last < task["idle_s"]:
        time.sleep(0.5)
    return {}


def fetch(task: Json, progress: Progress) -> Json:
    """Copy the model from a host that serves it; what is there already is kept, and what differs is refused."""
    with alone(Path(task["path"]), progress):
        return _fetch(task, progress)


def _fetch(task: Json, progress: Progress) -> Json:
    root, part = Path(task["path"]), Path(task["path"] + ".part")
    wanted: Json = json.loads(_get(task, "manifest", 0).read())
    if wanted["digest"] != task["digest"]:
        raise Refused(f"{task['url']} gives another model than it had before: try again")
    rows: Json = wanted["files"]
    there = files_of(root) if root.is_dir() else {}
    if root.exists() and not root.is_dir():
        raise Refused(f"{root} is no folder")
    other = [name for name, path in there.items() if name in rows and path.stat().st_size != rows[name]["size"]]
    if not other:
        progress.total = sum(path.stat().st_size for name, path in there.items() if name in rows)
        progress.verb = "checking"
        other = [name for name in there if name in rows and sha256(there[name], progress.add) != rows[name]["sha256"]]
    strange = sorted([*other, *(name for name in there if name not in rows)])
    if strange:
        raise Refused(
            f"{root} holds another model than {task['from']}: {len(strange)} files differ, such as {strange[0]}. "
            "We overwrite no weights: move it away, or set model_source to path"
        )
    missing = [name for name in rows if name not in there]
    fresh = {name: part / name for name in missing}
    have = {name: min(path.stat().st_size, rows[name]["size"]) if path.exists() else 0 for name, path in fresh.items()}
    check_room(root, sum(rows[name]["size"] - have[name] for name in missing))
    progress.verb, progress.done, progress.began = "copying", 0, time.monotonic()
    progress.total = sum(rows[name]["size"] for name in missing)
    in_parallel(lambda name: _copy(task, name, rows[name], fresh[name], progress), missing)
    if root.exists():
        for name in missing:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(fresh[name], root / name)
        shutil.rmtree(part, ignore_errors=True)
    else:
        os.replace(part, root)
    made = make_manifest_of(rows, root)
    write_json(Path(task["manifest"]), made)
    return {"digest": made["digest"], "bytes": made["bytes"], "changed": bool(missing)}


def make_manifest_of(rows: Json, root: Path) -> Json:
    """Return the manifest of files that were just checked against ``rows``."""
    own = {name: {**row, "mtime_ns": (root / name).stat().st_mtime_ns} for name, row in rows.items()}
    return {"schema": 1, "digest": digest(own), "bytes": sum(row["size"] for row in own.values()), "files": own}


def _get(task: Json, name: str, start: int) -> Any:
    call = urllib.request.Request(f"{task['url']}/{urllib.parse.quote(name, errors='surrogateescape')}")
    call.add_header("Authorization", f"Bearer {task['token']}")
    if start:
        call.add_header("Range", f"bytes={start}-")
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(call, timeout=60)


def _copy(task: Json, name: str, row: Json, path: Path, progress: Progress) -> None:
    """Copy one file, going on where an earlier try ended; wrong content is fetched once more from its start."""
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = path.stat().st_size if path.exists() else 0
        try:
            seen = hashlib.sha256()
            for block in blocks(path) if before else ():
                seen.update(block)
            if before < row["size"]:
                with _get(task, name, before) as answer, path.open("ab") as file:
                    for block in iter(lambda: answer.read(_CHUNK), b""):
                        file.write(block)
                        seen.update(block)
                        progress.add(len(block))
                    file.flush()
                    os.fsync(file.fileno())
            elif not before:
                path.touch()
            if path.stat().st_size == row["size"] and seen.hexdigest() == row["sha256"]:
                progress.add(before)
                return
            if path.stat().st_size >= row["size"]:
                path.unlink()
                raise OSError("its checksum was wrong")
            raise OSError("it came only in part")
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) == 28:
                raise
            failures += 1
            if failures > 4:
                raise Refused(
                    f"{name} could not be copied from {task['from']}: {error}; what came is kept for the next try"
                ) from None
            time.sleep(failures)


# ---------------------------------------------------------------- from the hub


def download(task: Json, progress: Progress) -> Json:
    """Download a model from the hub (with the Python of a virtualenv that has huggingface_hub), checked by the hub's checksums."""
    with alone(Path(task["path"]), progress):
        # Another host that shares the file system was first.
        return _download(task, progress) if fault(Path(task["path"])) else hash_model(task, progress)


def _download(task: Json, progress: Progress) -> Json:
    os.environ.update({"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    if task["endpoint"]:
        os.environ["HF_ENDPOINT"] = task["endpoint"]
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    root, part = Path(task["path"]), Path(task["path"] + ".part")
    progress.say("running", "asking the hub")
    try:
        info = HfApi(token=task["token"] or False).model_info(task["repo"], revision=task["revision"], files_metadata=True)
        rows = {row.rfilename: row for row in info.siblings or [] if not row.rfilename.startswith(".")}
        have = sum(path.stat().st_size for path in part.rglob("*") if path.is_file()) if part.exists() else 0
        progress.total = sum(row.size or 0 for row in rows.values())
        progress.verb = "downloading"
        check_room(root, max(progress.total - have, 0))
        part.mkdir(parents=True, exist_ok=True)
        stop = threading.Event()
        threading.Thread(target=_watch, args=(part, progress, stop), daemon=True).start()
        try:
            snapshot_download(
                task["repo"], revision=info.sha, local_dir=str(part), token=task["token"] or False, ignore_patterns=[".*"]
            )
        finally:
            stop.set()
    except GatedRepoError:
        raise Refused(
            f"{task['repo']} is gated: accept its terms on the hub, and set hf_token to a token of that account"
        ) from None
    except RevisionNotFoundError:
        raise Refused(f"{task['repo']} has no revision {task['revision']}: set another model_revision") from None
    except RepositoryNotFoundError:
        raise Refused(f"the hub has no {task['repo']}, or it is private and hf_token may not see it") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise Refused(f"{task['repo']} could not be downloaded: {said[0]}; what came is kept for the next try") from None
    progress.verb, progress.done, progress.began = "checking", 0, time.monotonic()
    hashes: Json = {}

    def one(name: str) -> None:
        path, row = part / name, rows[name]
        hashes[name] = {"size": path.stat().st_size, "sha256": sha256(path, progress.add)}
        right = row.lfs.sha256 == hashes[name]["sha256"] if row.lfs else row.blob_id == _git_blob(path)
        if not right:
            path.unlink()
            raise Refused(f"{name} of {task['repo']} is not what the hub says it is: try again")

    in_parallel(one, list(rows))
    shutil.rmtree(part / ".cache", ignore_errors=True)
    os.replace(part, root)
    made = {**make_manifest_of(hashes, root), "source": f"{task['repo']}@{info.sha}"}
    write_json(Path(task["manifest"]), made)
    return {"digest": made["digest"], "bytes": made["bytes"], "changed": True}


def _git_blob(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _watch(part: Path, progress: Progress, stop: threading.Event) -> None:
    """Count what is there, which is all that the hub's client lets us know."""
    while not stop.wait(1.0):
        try:
            done = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
        except OSError:
            continue
        progress.done, progress.said = min(done, progress.total), 0.0
        progress.add(0)


TASKS = {"hash": hash_model, "serve": serve, "fetch": fetch, "download": download}


def main() -> int:
    """Do the task on standard input."""
    task = json.loads(sys.stdin.read())
    os.umask(0o022)
    progress = Progress(task["progress"], {"hash": "hashing", "serve": "hashing"}.get(task["task"], task["task"]))
    try:
        result = TASKS[task["task"]](task, progress)
    except Refused as refusal:
        progress.say("error", str(refusal))
        return 1
    except (OSError, http.client.HTTPException) as error:
        progress.say("error", f"{task['task']} of {task['path']}: {error}")
        return 1
    progress.say("done", "", **result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
