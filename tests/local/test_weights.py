"""Models brought to the two hosts of the default inventory: from one to the other, and from a hub that runs here."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from local.conftest import Checkout

from pdlib import model_tool

TOKEN = "hf_a-token-that-shows-nowhere"
NAME = "tiny/model"
SHA = "c0ffee" * 6 + "0123"


def model_files() -> dict[str, bytes]:
    header = json.dumps({"w": {"dtype": "U8", "shape": [3_000_000], "data_offsets": [0, 3_000_000]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + os.urandom(3_000_000)
    return {"config.json": b"{}", "model.safetensors": weights, "sub/notes.txt": b"x"}


def place(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def there(root: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in model_tool.files_of(root).items()}


class Hub(http.server.ThreadingHTTPServer):
    """As much of a hub as snapshot_download asks for; it wants the token, and counts requests."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files, self.asked = files, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.server.asked += 1
        path = urlsplit(self.path).path
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, b'{"error": "no"}', body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif path.startswith(f"/api/models/{NAME}/tree/{SHA}"):
            self._send(200, json.dumps(self._tree()).encode(), body, {"Content-Type": "application/json"})
        elif path.startswith(f"/api/models/{NAME}"):
            self._send(200, json.dumps(self._info()).encode(), body, {"Content-Type": "application/json"})
        elif path.startswith(f"/{NAME}/resolve/{SHA}/"):
            content = self.server.files[path.partition(f"/resolve/{SHA}/")[2]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._send(200, content, body, {"ETag": etag, "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"})
        else:
            self._send(404, b"{}", body, {})

    def _info(self) -> dict[str, object]:
        rows = []
        for name, content in {**self.server.files, ".gitattributes": b"hidden"}.items():
            row: dict[str, object] = {"rfilename": name, "size": len(content)}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                row["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            row["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            rows.append(row)
        return {"id": NAME, "modelId": NAME, "sha": SHA, "private": False, "tags": [], "downloads": 0, "siblings": rows}

    def _tree(self) -> list[dict[str, object]]:
        rows = []
        for name, content in self.server.files.items():
            digest = hashlib.sha256(content).hexdigest()
            lfs = {"lfs": {"oid": digest, "size": len(content), "pointerSize": 130}} if name.endswith(".safetensors") else {}
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            rows.append({"type": "file", "path": name, "size": len(content), "oid": oid, **lfs})
        return rows

    def _send(self, code: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub(model_files())
    threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def roots(checkout: Checkout) -> tuple[Path, Path]:
    first, second = (checkout.folder / ".pd" / f"models-{host}" / "tiny--model" for host in ("gh200", "a100"))
    return first, second


def model_args(source: str) -> list[str]:
    return ["-e", f"model={NAME}", "-e", f"model_source={source}", "-e", "ratio=1p1d"]


def test_the_host_that_has_the_model_gives_it_to_the_other(clean: Checkout) -> None:
    giver, other = roots(clean)
    files = model_files()
    place(giver, files)
    try:
        done = clean.play("deploy_pd.yml", *model_args("rsync")).good()
        assert "copied tiny/model (0.00 GB) from gh200" in done.text
        assert there(other) == there(giver) == files
        assert not [line for line in clean.processes() if "model_tool" in line]

        # what differs is neither overwritten nor served
        (other / "config.json").write_text("{ }")
        refused = clean.play("deploy_pd.yml", *model_args("rsync"))
        assert refused.code != 0
        assert "another model than gh200: 1 files differ, such as config.json" in " ".join(refused.text.split())
        assert (other / "config.json").read_text() == "{ }"
        assert not [line for line in clean.processes() if "model_tool" in line]

        clean.play("teardown.yml").good()
        assert there(giver) == files, "weights outlive a teardown"
    finally:
        for root in (giver, other):
            for name in [*files, *(path.name for path in root.parent.glob("*.json"))]:
                (root / name).unlink(missing_ok=True)
                (root.parent / name).unlink(missing_ok=True)


def test_a_model_is_fetched_without_a_deploy_for_the_next_cell_of_a_sweep(clean: Checkout) -> None:
    giver, other = roots(clean)
    files = model_files()
    place(giver, files)
    try:
        clean.play("playbooks/fetch.yml", *model_args("rsync")).good()
        assert there(other) == files
        assert not clean.processes(), "nothing was deployed"
        assert not list((clean.folder / ".pd").glob("state-*/lock.json")), "no lock was taken"
    finally:
        for root in (giver, other):
            for name in [*files, *(path.name for path in root.parent.glob("*.json"))]:
                (root / name).unlink(missing_ok=True)
                (root.parent / name).unlink(missing_ok=True)


def test_a_model_comes_from_the_hub_with_a_token_that_shows_nowhere(clean: Checkout, hub: Hub, tmp_path: Path) -> None:
    secret = tmp_path / "secret.yml"
    secret.write_text(f"hf_token: {TOKEN}\n")
    where = ["-e", f"model_endpoint={hub.url}", "-e", f"model_revision={SHA}"]
    first, second = (root.with_name(f"{root.name}@{SHA}") for root in roots(clean))

    gated = clean.play("deploy_pd.yml", *model_args("hub"), *where)
    assert gated.code != 0
    assert "tiny/model is gated" in gated.text
    assert not first.exists()

    done = clean.play("deploy_pd.yml", *model_args("hub"), *where, "-e", f"@{secret}", "-vv").good()
    assert "downloaded tiny/model" in done.text
    assert there(first) == there(second) == hub.files
    manifest = model_tool.read_json(first.with_name(f"{first.name}.pd.json"))
    assert manifest is not None
    assert manifest["source"] == f"{NAME}@{SHA}"
    assert TOKEN not in done.text
    leaked = [path for path in (clean.folder / ".pd").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not leaked
    assert {model["id"] for model in clean.ask("/v1/models")["data"]} == {NAME}

    asked = hub.asked
    again = clean.play("deploy_pd.yml", *model_args("hub"), *where, "-e", f"@{secret}").good()
    assert set(again.changed.values()) == {0}
    assert hub.asked == asked, "what is whole and known is not asked for again"
