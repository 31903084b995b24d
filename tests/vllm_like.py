"""Workers that answer as vLLM's API server does where a router can see it (0.33, NixlConnector); no model, and quick."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any


class VllmLike:
    """One worker: what it was asked (``calls``: method and path, ``bodies``: of completions) where prompts came
    from (``sources``), and what came as key with completions (``keys``)."""

    def __init__(self, name: str) -> None:
        self.name, self.calls, self.bodies = name, Counter[str](), list[dict[str, Any]]()
        self.sources, self.keys = Counter[str](), set[str]()
        worker = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
                with worker.lock:
                    if self.path == "/v1/completions":
                        worker.keys.add(self.headers.get("Authorization", ""))
                    status, answer = worker.answer(self.command, self.path.partition("?")[0], body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain" if isinstance(answer, bytes) else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do

        self.lock = threading.Lock()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Return status and body."""
        self.calls[f"{method} {path}"] += 1
        if path in ("/health", "/ping"):
            return 200, b""
        if path == "/version":
            return 200, {"version": "0.33.0"}
        if path == "/v1/models":
            model = {"id": "m", "object": "model", "created": 0, "owned_by": "vllm", "root": "m", "max_model_len": 4096}
            return 200, {"object": "list", "data": [model]}
        if path == "/metrics":
            return 200, b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
        if path == "/v1/completions":
            return self.complete(body)
        return 404, {"detail": "Not Found"}

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Return a completion; with kv_transfer_params, this worker's half of the two steps."""
        self.bodies.append(body)
        asked = body.get("kv_transfer_params") or {}
        told = None
        if asked.get("do_remote_decode"):
            told = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": self.name,
                "remote_block_ids": [[1]],
            }
            told |= {
                "remote_request_id": f"{self.name}-{len(self.bodies)}",
                "remote_host": "127.0.0.1",
                "remote_port": 5600,
                "tp_size": 1,
            }
        self.sources["external_kv_transfer" if asked.get("do_remote_prefill") else "local_compute"] += 1
        tokens = int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)
        choice = {"index": 0, "text": " x" * tokens, "logprobs": None, "finish_reason": "length"}
        usage = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
        head = {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": "m"}
        return 200, {**head, "choices": [choice], "usage": usage, "kv_transfer_params": told}


@contextlib.contextmanager
def workers(*names: str) -> Iterator[list[VllmLike]]:
    """Workers of these names."""
    made = [VllmLike(name) for name in names]
    try:
        yield made
    finally:
        for worker in made:
            worker.server.shutdown()
            worker.server.server_close()
