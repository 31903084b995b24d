"""A server of known timing, well- or ill-behaved by the model's name: what the load generator is tested against.

    python truth_server.py PORT [prefill|decode|aggregated]

The first token comes FIRST_S after the request, each further one GAP_S later. Models: ``good``; ``lumps`` (4 tokens an event);
``error-event``, ``truncated``, ``reset`` (after 2 tokens); ``unavailable`` (503); ``wrong`` (200 with an error body); ``whole``
(not streamed); ``short`` (one token too few); ``hang`` (no answer); ``no-ids`` (token ids refused); ``flaky`` (each fifth fails);
``slow`` (tokens 0.2 s apart). GET /seen tells the bodies received, with their arrival times, and the most that ran at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from aiohttp import web

FIRST_S, GAP_S = 0.02, 0.005
ROLE = sys.argv[2] if len(sys.argv) > 2 else "aggregated"
KEY = sys.argv[3] if len(sys.argv) > 3 else ""
seen: list[dict[str, Any]] = []
running = {"now": 0, "most": 0}


def prompt_length(body: dict[str, Any]) -> int:
    prompt = body.get("input_ids") or body.get("prompt") or body.get("text") or body["messages"][0]["content"]
    return len(prompt.split() if isinstance(prompt, str) else prompt)


def event(path: str, total: int, fresh: int, isl: int, last: bool) -> bytes:
    usage = {"prompt_tokens": isl, "completion_tokens": total}
    if path == "/generate":
        reason = {"type": "length", "length": total} if last else None
        message: dict[str, Any] = {"text": " a" * total, "meta_info": {**usage, "cached_tokens": 0, "finish_reason": reason}}
    else:
        text = {"delta": {"content": " a" * fresh}} if "chat" in path else {"text": " a" * fresh}
        message = {"choices": [{"index": 0, **text, "finish_reason": "length" if last else None}], "usage": usage}
    return b"data: " + json.dumps(message).encode() + b"\n\n"


async def answer(request: web.Request) -> web.StreamResponse:
    running["now"] += 1
    running["most"] = max(running.values())
    try:
        return await answer_as(request)
    finally:
        running["now"] -= 1


async def answer_as(request: web.Request) -> web.StreamResponse:
    if KEY and request.headers.get("Authorization") != f"Bearer {KEY}":
        return web.json_response({"error": {"message": "who are you?"}}, status=401)
    body = await request.json()
    seen.append({"t": time.perf_counter(), "body": body})
    kind = body.get("model") or "good"
    isl = prompt_length(body)
    osl = body.get("max_completion_tokens") or body.get("max_tokens") or body["sampling_params"]["max_new_tokens"]
    # The router sends the same to both; prefill answers with its one token.
    osl = 1 if ROLE == "prefill" else osl
    if kind == "flaky":
        kind = "unavailable" if len(seen) % 5 == 0 else "good"
    if osl == 1 and kind != "no-ids":
        kind = "good"  # the probe
    if kind == "unavailable":
        return web.json_response({"error": {"message": "no workers"}}, status=503)
    if kind == "wrong":
        return web.json_response({"error": {"message": "bad room"}})
    if kind == "whole":
        return web.json_response({"choices": [{"text": " a" * osl}]})
    if kind == "no-ids" and isinstance(body.get("prompt"), list):
        return web.Response(status=422, text="data did not match any variant of untagged enum StringOrArray")
    if kind == "hang":
        await asyncio.sleep(3600)
    osl -= kind == "short"
    step = 4 if kind == "lumps" else 1
    gap = 0.2 if kind == "slow" else GAP_S
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    start = time.perf_counter()
    sent = 0
    while sent < osl:
        fresh = min(step if sent else 1, osl - sent)
        sent += fresh
        await asyncio.sleep(max(0.0, start + FIRST_S + (sent - 1) * gap - time.perf_counter()))
        await response.write(event(request.path, sent, fresh, isl, sent == osl))
        if sent == 2 and kind == "error-event":
            await response.write(b'data: {"error": {"message": "out of memory"}}\n\n')
            break
        if sent == 2 and kind in ("truncated", "reset"):
            assert request.transport is not None
            if kind == "reset":
                request.transport.abort()
            else:
                request.transport.close()
            return response
    await response.write(b"data: [DONE]\n\n")
    return response


async def tell(request: web.Request) -> web.Response:
    return web.json_response({"most": running["most"], "seen": seen})


async def status(request: web.Request) -> web.Response:
    return web.json_response(
        {
            "model_path": "m",
            "served_model_name": "m",
            "disaggregation_mode": ROLE,
            "tp_size": 1,
            "version": "0.5.23",
            "secret": "x",
        }
    )


async def metrics(request: web.Request) -> web.Response:
    return web.Response(text=f"# TYPE sglang:num_requests_total counter\nsglang:num_requests_total {len(seen)}\n")


def main() -> None:
    app = web.Application(client_max_size=2**26)
    for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
        app.router.add_post(path, answer)
    for path in ("/health", "/ready", "/server_info", "/model_info", "/get_model_info"):
        app.router.add_get(path, status)
    app.router.add_get("/seen", tell)
    app.router.add_get("/metrics", metrics)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, shutdown_timeout=0.1)


if __name__ == "__main__":
    main()
