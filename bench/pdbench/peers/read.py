"""What a peer wrote, in the names of our summary.json; its definitions stay its own (`pdbench.peers.beside`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pdbench.reading import json_of

Json = dict[str, Any]
#: our name -> what SGLang, and what vLLM call it
_LATENCIES = {
    "ttft_ms": ("ttft", "ttft"),
    "tpot_ms": ("tpot", "tpot"),
    "itl_ms": ("itl", "itl"),
    "e2e_ms": ("e2e_latency", "e2el"),
}


class NotReadableError(Exception):
    """The file is not what this version of the peer writes; the message is for the user."""


def sglang(text: str, asked: int) -> Json:
    """Read the last line of `sglang.benchmark.serving --output-file`; ``asked``: requests, from which ``failed`` follows.

    Rates are a second, latencies milliseconds. Raises NotReadableError.
    """
    lines = text.strip().splitlines()
    found = _object(lines[-1] if lines else "")
    completed = _count(found, "completed")
    return {
        "completed": completed,
        "failed": asked - completed,
        "duration_s": _number(found, "duration"),
        "request_throughput": _number(found, "request_throughput"),
        "input_throughput": _number(found, "input_throughput"),
        "output_throughput": _number(found, "output_throughput"),
        "total_throughput": _number(found, "total_throughput"),
        "output_tokens": _count(found, "total_output_tokens"),
        "output_tokens_retokenised": _count(found, "total_output_tokens_retokenized"),
        **{key: _spread(found, names[0], completed) for key, names in _LATENCIES.items()},
    }


def vllm(text: str, asked: int) -> Json:
    """Read the file of `vllm bench serve --save-result`; ``asked`` as for `sglang`. Raises NotReadableError."""
    found = _object(text)
    completed, duration = _count(found, "completed"), _number(found, "duration")
    return {
        "completed": completed,
        "failed": asked - completed,
        "duration_s": duration,
        "request_throughput": _number(found, "request_throughput"),
        # It is not among vLLM's rates.
        "input_throughput": _count(found, "total_input_tokens") / duration if duration else 0.0,
        "output_throughput": _number(found, "output_throughput"),
        "total_throughput": _number(found, "total_token_throughput"),
        "output_tokens": _count(found, "total_output_tokens"),
        "output_tokens_retokenised": None,
        **{key: _spread(found, names[1], completed) for key, names in _LATENCIES.items()},
    }


READERS = {"sglang": sglang, "vllm": vllm}


def _object(text: str) -> Json:
    try:
        found = json_of(text)
    except ValueError as why:
        raise NotReadableError(f"no JSON: {why}") from None
    if not isinstance(found, dict):
        raise NotReadableError("no JSON object")
    return found


def _number(found: Mapping[str, Any], key: str) -> float:
    value = found.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise NotReadableError(f"{key} is {'missing' if key not in found else repr(value)}, and should be a number")
    return float(value)


def _count(found: Mapping[str, Any], key: str) -> int:
    value = _number(found, key)
    if value != int(value) or value < 0:
        raise NotReadableError(f"{key} is {value:g}, and should be a whole number")
    return int(value)


def _spread(found: Mapping[str, Any], name: str, completed: int) -> Json:
    """Return mean and quantiles; nothing where no request was answered, for which both tools write zeros."""
    keys = {"mean": f"mean_{name}_ms", "p50": f"median_{name}_ms", **{f"p{p}": f"p{p}_{name}_ms" for p in (90, 95, 99)}}
    return {key: _number(found, theirs) if completed else None for key, theirs in keys.items()}
