"""A plan.json that is read back: what planning takes from it is there and of its type, or the file is refused by name."""

from __future__ import annotations

import json
from typing import Any, Dict

from . import ratio as ratios
from .errors import UserError

Json = Dict[str, Any]
#: the number of plan.json: it goes up when a name goes, or comes to mean something else (docs/formats.md)
SCHEMA = 1
_WORDS = {str: "text", int: "a whole number", bool: "true or false", dict: "a mapping", list: "a list"}
_RANK = {
    **{"host!": str, "gpus!": [int], "argv!": [str], "env!": {"*": str}, "unit!": str, "address": str, "listen": str},
    **dict.fromkeys(("node_rank", "port", "bootstrap_port", "side_channel_port", "side_channels", "dist_init_port"), int),
    **{"rdma_devices": [str], "container": dict},
}
_LINK = {
    **{"fabric!": str, "devices!": [str], "masked!": [str], "ports!": {"*": int}, "gid_index": int, "tcp_device": str},
    **{"nearest!": {"*": [str]}, "reasons!": {"*": str}},
}
_PATHS = dict.fromkeys(("service_manager", "state_dir", "install_dir"), str)
#: A name that ends in "!" must be there, others may be absent or null; "*" stands for any other name.
_PLAN: Json = {
    **{"ratio!": str, "engine": str, "engine_version": str, "model": str, "transfer_backend": str},
    **{"api_key": bool, "admin_api_key": bool, "hf_token": bool},
    "workers!": [{"name!": str, "role!": str, "url!": str, "ranks!": [_RANK]}],
    "pairs": [{"prefill!": str, "decode!": str, "expected_transport": str}],
    "router!": {**{"host!": str, "unit": str, "argv": [str], "url": str, "address": str, "tls_ca": str}, "members": [str]},
    "hosts": {
        "*": {
            **{"address": str, "tcp_addresses": [str], "gpus": [int], "link": _LINK},
            **{"firewall": {"spared!": [str], "range!": [int]}, **_PATHS},
        }
    },
    "firewall": {"bench!": {"*": str}, "clients!": [str], "monitors!": [str], "meet_port": int},
    "overrides": dict,
    "kv_probe": {"*": dict},
}


def newer(plan: Any) -> str:
    """Return why a plan of a later checkout is not read, "" for all others."""
    found = plan.get("schema") if isinstance(plan, dict) else None
    if isinstance(found, int) and found > SCHEMA:
        return f"it has schema {found}, and this checkout knows {SCHEMA}: use the checkout that wrote it, or a newer one"
    return ""


def parse(text: str, where: str, remedy: str) -> Json:
    """Return the plan in a JSON text; raise UserError naming ``where``, what is wrong there, and the ``remedy``."""
    try:
        found = json.loads(text)
        if later := newer(found):
            raise UserError(f"{where}: {later}")
        fault = _fault(found, _PLAN, "") or _odd(found)
    except RecursionError:
        fault = "it is nested too deep"
    except ValueError as error:
        fault = str(error)
    if fault:
        raise UserError(f"{where} is not a plan ({fault}): {remedy}")
    return dict(found)


def _odd(plan: Json) -> str:
    """What types do not say: names with a number, and at least one rank."""
    try:
        ratios.parse(plan["ratio"])
    except UserError as error:
        return str(error)
    for worker in plan["workers"]:
        number = worker["name"].rsplit("-", 1)[-1]
        if not (number.isascii() and number.isdigit() and len(number) < 7) or not worker["ranks"]:
            return f"worker {worker['name']} has no number or no rank"
        if worker["role"] not in ("prefill", "decode", "aggregated") or worker["name"] != f"{worker['role']}-{number}":
            return f"worker {worker['name']} is called by no role: {worker['role']}"
    return ""


def _fault(value: Any, shape: Any, at: str) -> str:
    """Return where a value is not of the shape and what would be right, "" when it is."""
    # pdbench/shapes.py does the like for a run's files: it is installed where pdlib is not, and pdlib goes to hosts without it.
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return _said(value, dict, at)
        absent = [name[:-1] for name in shape if name.endswith("!") and value.get(name[:-1]) is None]
        if absent:
            return f"{at}.{absent[0]} is missing".lstrip(".")
        for name, item in value.items():
            inner = shape.get(name, shape.get(f"{name}!", shape.get("*")))
            fault = _fault(item, inner, f"{at}.{name}".lstrip(".")) if inner is not None and item is not None else ""
            if fault:
                return fault
        return ""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _said(value, list, at)
        return next(filter(None, (_fault(item, shape[0], f"{at}[{place}]") for place, item in enumerate(value))), "")
    good = isinstance(value, shape) and (shape is bool or not isinstance(value, bool))
    return "" if good else _said(value, shape, at)


def _said(value: Any, kind: Any, at: str) -> str:
    return f"{at or 'it'} is {repr(value)[:60]}, and should be {_WORDS[kind]}"
