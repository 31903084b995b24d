"""What a worker that left the router still has to do, by the engine's own counters."""

from __future__ import annotations

import json
import re
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from .errors import UserError
from .steps import STEP_S, Outcome

#: (method, URL) -> (HTTP status, text), as ask.request
Ask = Callable[[str, str], Tuple[int, str]]
#: Requests that the router sent just before it let go are seen by then, and answers are with their readers.
QUIET_S = 1.5
#: A worker that says nothing for so long is gone, and its host perhaps with it.
SILENT_S = 20.0

#: gauges of /metrics that count requests, by engine, and what they are called here
_GAUGES = {
    "sglang:num_running_reqs": "running",
    "sglang:num_queue_reqs": "waiting",
    "sglang:num_prefill_bootstrap_queue_reqs": "waiting for decode",
    "sglang:num_prefill_inflight_queue_reqs": "sending KV",
    "sglang:num_decode_prealloc_queue_reqs": "waiting for memory",
    "sglang:num_decode_transfer_queue_reqs": "receiving KV",
    "sglang:num_retracted_reqs": "retracted",
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
}
_SAMPLE = re.compile(r"^([a-z:_]+)(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.M)


def of_loads(answer: Mapping[str, Any]) -> Dict[str, int]:
    """Return the requests in ``/v1/loads`` by where they are, over all data-parallel ranks."""
    found: Dict[str, int] = {}

    def add(name: str, count: Any) -> None:
        found[name] = found.get(name, 0) + int(count or 0)

    for load in answer["loads"]:
        add("running", load["num_running_reqs"])
        # All that are here and do not run, those among them that wait for memory or for their KV cache.
        add("waiting", load["num_waiting_reqs"])
        disagg = load.get("disaggregation") or {}
        # These have run, and their KV cache is still on its way.
        add("sending KV", disagg.get("prefill_inflight_queue_reqs"))
    return found


def of_metrics(text: str) -> Optional[Dict[str, int]]:
    """Return the same from ``/metrics``, None where no gauge of an engine that we know is among them."""
    found: Dict[str, int] = {}
    for name, value in _SAMPLE.findall(text):
        if name in _GAUGES:
            found[_GAUGES[name]] = found.get(_GAUGES[name], 0) + int(float(value))
    return found or None


def under_way(url: str, ask: Ask) -> Tuple[Optional[Dict[str, int]], str]:
    """Return (a worker's requests by where they are, ""), or (None, why it cannot say)."""
    status, text = ask("GET", f"{url}/v1/loads?include=core,disagg")
    try:
        if status == 200:
            return of_loads(json.loads(text)), ""
    except (ValueError, KeyError, TypeError):
        return None, "its /v1/loads cannot be read"
    if status in (404, 405, 501):
        status, text = ask("GET", f"{url}/metrics")
        counts = of_metrics(text) if status == 200 else None
        return (counts, "") if counts is not None else (None, "neither /v1/loads nor /metrics counts its requests")
    return None, f"HTTP {status}" if status else text


def refused(why: str) -> bool:
    """Whether nothing listens any more: a process that is gone has no requests."""
    return "refused" in why.lower()


def wait(workers: Mapping[str, str], ask: Ask) -> Outcome:
    """Wait for some seconds until the workers (name -> URL) have nothing left to do.

    Raises UserError when one of them says nothing for SILENT_S seconds.
    """
    started = time.monotonic()
    quiet_since: Optional[float] = None
    heard = {name: started for name in workers}
    while True:
        busy: List[str] = []
        silent = False
        for name, url in workers.items():
            counts, why = under_way(url, ask)
            if counts is None and not refused(why):
                silent = True
                if time.monotonic() - heard[name] > SILENT_S:
                    raise UserError(
                        f"{name} at {url} left the router and does not say whether it still has requests ({why}). The others "
                        "serve. The same command goes on once it answers; deploy_pd.yml with the ratio of before brings it back"
                    )
                continue
            heard[name] = time.monotonic()
            rest = {where: count for where, count in (counts or {}).items() if count}
            if rest:
                busy.append(f"{name} ({', '.join(f'{count} {where}' for where, count in rest.items())})")
        now = time.monotonic()
        if busy or silent:
            quiet_since = None
        elif quiet_since is None:
            quiet_since = now
        elif now - quiet_since >= QUIET_S:
            return Outcome(done=True)
        if now - started > STEP_S and not silent and quiet_since is None:
            return Outcome(message=f"out of the router, and still at work: {'; '.join(busy)}")
        time.sleep(0.2)
