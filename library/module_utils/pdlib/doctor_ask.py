"""What router and workers of a deployment say of themselves, and whether requests go through: asked from one host, changing nothing."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, List, Mapping, Optional
from urllib.parse import urlsplit

from . import firewall
from .ask import opener
from .doctor_facts import Json
from .gateway import Gateway

#: Of a worker's /server_info what is judged; the whole of it is hundreds of keys.
_INFO = (
    *("version", "page_size", "kv_cache_dtype", "disaggregation_mode", "disaggregation_transfer_backend"),
    *("disaggregation_bootstrap_port", "slow_down_s", "profiling", "emulated_transport"),
)
#: Counters of KV transfers, or their bootstrap, that failed: SGLang's num_transfer_failed_reqs_total, vLLM's
#: nixl_num_failed_transfers_total, ...
_FAILED = re.compile(r"^([\w:]*(?:transfer|bootstrap|nixl)\w*)(?:\{.*\})?\s+(\S+)$")
_STREAM_TOKENS = 24


def ask(plan: Mapping[str, Any], key: Optional[str], name: str, requests: bool, pair_s: float) -> Json:
    """Return what ``name`` (the host that asks) heard: ``from``, ``router``, ``workers`` by name, ``pairs``, ``stream``.

    ``requests``: whether a request is sent over every pair and one through the router; ``pair_s``: how long each may take.
    """
    gateway = Gateway(plan["router"]["url"], key, plan["router"])
    with ThreadPoolExecutor(max_workers=16) as pool:
        front = pool.submit(_router, gateway)
        answers = pool.map(lambda worker: _worker(gateway, worker, plan, name), plan["workers"])
        said = dict(zip((worker["name"] for worker in plan["workers"]), answers))
    heard: Json = {"from": name, "router": front.result(), "workers": said, "pairs": [], "stream": {}}
    if requests:
        heard["pairs"] = _pairs(gateway, plan, said, pair_s)
        # A stream that takes a pair which is known to hang would hang, too.
        if heard["router"]["ready"] == 200 and not any(row["error"] for row in heard["pairs"]):
            heard["stream"] = _twice(lambda: stream(gateway, plan["served_model_name"], pair_s))
    return heard


def _twice(ask_stream: Callable[[], Json]) -> Json:
    """Ask again where a stream came in one piece: on a busy host that may be this process, which was late to read it."""
    first = ask_stream()
    if first["error"] or spread(first) >= 0.1:
        return first
    return max(first, ask_stream(), key=spread)


def spread(said: Json) -> float:
    """Return the share of a stream's time in which its tokens came; 0 for one that failed."""
    times, end = said["tokens_s"], said["end_s"]
    return float((end - times[0]) / end) if times and end else 0.0


def _router(gateway: Gateway) -> Json:
    status, text = gateway.request("GET", f"{gateway.url}/readiness")
    if status == 404:
        # Routers that learn their workers at their start have /health alone.
        status, text = gateway.request("GET", f"{gateway.url}/health")
    listed, rows = gateway.request("GET", f"{gateway.url}/workers")
    workers = None
    if listed == 200 and not gateway.restarts:
        try:
            workers = [
                {key: row.get(key) for key in ("url", "worker_type", "is_healthy", "bootstrap_port")}
                for row in json.loads(rows)["workers"]
            ]
        except (ValueError, TypeError, KeyError, AttributeError):
            workers = None
    if listed in (401, 403):
        status, text = listed, rows
    return {"ready": status, "error": " ".join(text.split())[:200] if status != 200 else "", "workers": workers}


def _worker(gateway: Gateway, worker: Mapping[str, Any], plan: Mapping[str, Any], name: str) -> Json:
    url, rank = worker["url"], worker["ranks"][0]
    health, why = gateway.request("GET", rank.get("health_url") or f"{url}/health")
    said: Json = {"health": health, "error": "" if health == 200 else " ".join(why.split())[:200], "info": {}, "failures": {}}
    said["bootstrap_error"] = ""
    if not health:
        return said
    for path in ("/server_info", "/version"):
        status, text = gateway.request("GET", url + path)
        if status == 200:
            try:
                found = json.loads(text)
                said["info"] = {key: found[key] for key in _INFO if key in found}
            except (ValueError, TypeError):
                pass
            break
    status, text = gateway.request("GET", f"{url}/metrics")
    if status == 200:
        said["failures"] = failures(text)
    # A host without workers has no business at a bootstrap port, and a firewall of ours keeps it out.
    if rank.get("bootstrap_port") and firewall.comes_in(plan, name, rank["host"], rank["bootstrap_port"]):
        said["bootstrap_error"] = _closed(str(urlsplit(url).hostname), rank["bootstrap_port"])
    return said


def failures(page: str) -> Dict[str, float]:
    """Return the counters of failed transfers and bootstraps on a metrics page, each summed over its labels."""
    found: Dict[str, float] = {}
    for line in page.splitlines():
        match = _FAILED.match(line)
        if match and "failed" in match[1] and match[1].endswith("_total"):
            try:
                found[match[1]] = found.get(match[1], 0.0) + float(match[2])
            except ValueError:
                continue
    return found


def _closed(host: str, port: int) -> str:
    """Return why nothing can be connected to at a port, "" where something can."""
    try:
        socket.create_connection((host, port), timeout=3).close()
        return ""
    except OSError as error:
        return error.strerror or str(error)


def _pairs(gateway: Gateway, plan: Mapping[str, Any], said: Mapping[str, Json], pair_s: float) -> List[Json]:
    """Send one request over every pair of which both ends are healthy; the others would only wait for the time limit."""
    sick = {name for name, row in said.items() if row["health"] != 200}
    rows: List[Json] = []
    good = []
    for pair in plan["pairs"]:
        ends = [end for end in (pair["prefill"], pair["decode"]) if end in sick]
        if ends:
            rows.append({**pair, "seconds": 0.0, "error": f"not tried: {' and '.join(ends)} not healthy"})
        else:
            good.append(pair)
    workers = [worker for worker in plan["workers"] if worker["name"] not in sick]
    if good or not plan["pairs"]:
        rows = gateway.probe_pairs({**plan, "pairs": good, "workers": workers}, pair_s) + rows
    keys = ("prefill", "decode", "seconds", "error")
    return [{key: row[key] for key in keys} for row in rows]


def stream(gateway: Gateway, model: str, limit_s: float) -> Json:
    """Send one streamed request through the router; return when its events came, in seconds from the first byte sent.

    ``tokens_s``: events with text; ``empty_first_s``: when an event without any came before them (None: none did); ``end_s``;
    ``error``: "" when it went well.
    """
    said: Json = {"error": "", "tokens_s": [], "empty_first_s": None, "end_s": 0.0}
    body = {
        "model": model,
        "prompt": "Count from one to one hundred, please: ",
        "max_tokens": _STREAM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {gateway.key}"} if gateway.key else {})}
    call = urllib.request.Request(f"{gateway.url}/v1/completions", json.dumps(body).encode(), headers)
    started = time.monotonic()
    try:
        with opener(gateway.ca).open(call, timeout=limit_s) as answer:
            for line in answer:
                now = time.monotonic() - started
                _event(said, line, now)
                if now > limit_s:
                    said["error"] = f"not at its end after {limit_s:.0f} s"
                    break
    except urllib.error.HTTPError as error:
        said["error"] = f"HTTP {error.code} {error.read().decode(errors='replace').strip()[:200]}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        said["error"] = str(getattr(error, "reason", error)) or type(error).__name__
    said["end_s"] = round(time.monotonic() - started, 4)
    if not said["error"] and not said["tokens_s"]:
        said["error"] = "it ended without a token"
    return said


def _event(said: Json, line: bytes, now: float) -> None:
    """Note one line of a stream of server-sent events."""
    if not line.startswith(b"data:") or b"[DONE]" in line:
        return
    try:
        choices = json.loads(line[5:]).get("choices") or []
    except (ValueError, AttributeError):
        return
    if any(choice.get("text") for choice in choices):
        said["tokens_s"].append(round(now, 4))
    elif choices and not said["tokens_s"] and said["empty_first_s"] is None and not choices[0].get("finish_reason"):
        said["empty_first_s"] = round(now, 4)
