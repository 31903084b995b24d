"""What stands in the JSON files of a run, as far as it is read: a damaged file is named instead of breaking its readers.

A shape is a type (`float`: any finite number), ``[shape]``, or a mapping of names to shapes. A name that ends in ``!`` must be
there; all others may be absent or null. ``*`` stands for every other name.
"""

from __future__ import annotations

import math
from typing import Any

#: what every JSON file of ours says as ``schema``: it goes up when a name goes, or comes to mean something else (docs/formats.md)
SCHEMA = 1
_STATS = {"*": float}
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping", list: "a list"}
_LOADS = {
    **dict.fromkeys(("concurrency", "num_requests", "seed", "max_isl", "max_osl"), int),
    "batch": bool,
    **dict.fromkeys(("request_rate", "request_rate_to", "time_scale", "length_scale", "duration"), float),
    **dict.fromkeys(("isl", "osl", "arrival", "trace"), str),
}
_POINT: dict[str, Any] = {
    **_LOADS,
    **dict.fromkeys(("point", "completed", "failed", "gpus", "input_tokens", "output_tokens"), int),
    **dict.fromkeys(("duration_s", "mean_in_flight"), float),
    **{f"{what}_throughput{per}": float for what in ("request", "input", "output", "total") for per in ("", "_per_gpu")},
    **dict.fromkeys(("ttft_ms", "tpot_ms", "e2e_ms", "itl_ms", "itl_token_ms", "normalised_latency_ms"), _STATS),
    **dict.fromkeys(("ttft_scheduled_ms", "e2e_scheduled_ms", "request_output_throughput", "output_throughput_per_user"), _STATS),
    "goodput": {"slo": _STATS, "met": _STATS, "attainment_interval": [float], "*": float},
    "intervals": {"level": float, "*": {"*": [float]}},
    "client": dict,
    "steady": dict,
    "attribution": dict,
    "invalid_reasons": [str],
    "notes": [str],
    **dict.fromkeys(("ratio", "ended_early"), str),
}
SUMMARY: dict[str, Any] = {
    **_POINT,
    "points": [_POINT],
    "not_run": [dict],
    "api": str,
    "no_gpu": str,
    "truncated": str,
    "valid": bool,
}
_RANK = {"host!": str, "gpus!": [int], "unit": str, "argv": [str], "env": dict, "port": int, "bootstrap_port": int}
PLAN: dict[str, Any] = {
    "workers!": [{"name!": str, "role": str, "url!": str, "ranks!": [_RANK]}],
    "pairs": [{"prefill!": str, "decode!": str, "expected_transport": str}],
    "router": {"url": str, "metrics_url": str, "name": str, "host": str, "argv": [str]},
    "hosts": {"*": dict},
    **dict.fromkeys(("ratio", "engine", "engine_version", "model", "served_model_name", "transfer_backend"), str),
    **dict.fromkeys(("emulated", "on_cpu"), bool),
}
_SIDE = {
    "t_s": float,
    "router": {"error": str, "metrics": _STATS},
    "workers": {"*": {"url": str, "server_info": dict, "metrics": _STATS, "error": str}},
}
EVIDENCE: dict[str, Any] = {
    "points!": [{"point": int, "reset": {"*": {"*": str}}, "before": _SIDE, "begin": _SIDE, "after": _SIDE}],
    "verify": {
        "prompts": int,
        "pairs": [{"prompts": int, "tokens": int, "wrong_prompts": int, "wrong_tokens": int, "worst_nats": float}],
        "*": object,
    },
}
PROGRESS: dict[str, Any] = {**dict.fromkeys(("point", "points", "done", "total", "failed"), int), "state": str, "message": str}
#: run.json
SETUP: dict[str, Any] = {
    **{"schema!": int, "api!": str, "prompt!": str, "points!": [_LOADS], "ratio": str, "gpus": int, "verify_outputs": int},
    **{"no_gpu": str, "truncated": str},
    "slo!": _STATS,
    "bounds!": _STATS,
}
SHARE: dict[str, Any] = {"share!": [int], "points!": [{"point!": int, "*": float}]}
#: sweep.json
SWEEP: dict[str, Any] = {
    "name": str,
    "source": str,
    "cells": [{"id!": str, "variables": dict, "deploy": dict, "load": dict, "inventory": str}],
    "order": [list],
    "spec": dict,
}


def newer(value: Any) -> str:
    """Return why a file of a later pdbench is not read; "" for all others. A manifest has its number under ``manifest``."""
    about = value.get("manifest", value) if isinstance(value, dict) else None
    found = about.get("schema") if isinstance(about, dict) else None
    if isinstance(found, int) and found > SCHEMA:
        return f"it has schema {found}, and this pdbench knows {SCHEMA}: use the checkout that wrote it, or a newer one"
    return ""


def wrong(value: Any, shape: Any, at: str = "") -> str:
    """Return where ``value`` is not of the shape, and what would be right; "" when it is."""
    if not at and (why := newer(value)):
        return why
    if isinstance(shape, dict):
        return _mapping(value, shape, at)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _said(value, list, at)
        faults = (wrong(item, shape[0], f"{at}[{place}]") for place, item in enumerate(value) if item is not None)
        return next(filter(None, faults), "")
    kinds = (int, float) if shape is float else shape
    good = isinstance(value, kinds) and (shape in (bool, object) or not isinstance(value, bool))
    if good and isinstance(value, float) and not math.isfinite(value):
        good = False
    return "" if good else _said(value, shape, at)


def _mapping(value: Any, shape: dict[str, Any], at: str) -> str:
    if not isinstance(value, dict):
        return _said(value, dict, at)
    for name in shape:
        if name.endswith("!") and value.get(name[:-1]) is None:
            return f"{at}.{name[:-1]} is missing".lstrip(".")
    for name, item in value.items():
        inner = shape.get(name, shape.get(f"{name}!", shape.get("*")))
        if inner is not None and item is not None and (fault := wrong(item, inner, f"{at}.{name}".lstrip("."))):
            return fault
    return ""


def _said(value: Any, shape: Any, at: str) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return f"{at or 'it'} is {shown}, and should be {_WORDS.get(shape, 'something else')}"
