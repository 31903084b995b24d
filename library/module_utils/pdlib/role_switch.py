"""The role of a worker that runs, changed where its engine was started to allow it (``--enable-pd-role-switch``)."""

from __future__ import annotations

import json
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

from .errors import UserError

#: where a worker is told its role; guarded by the admin key
PATH = "/pd_role_switch"
#: (method, URL, body) -> (HTTP status, text), as ask.request
Ask = Callable[[str, str, Optional[Dict[str, Any]]], Tuple[int, str]]


def _loads(url: str, section: str, ask: Ask) -> Mapping[str, Any]:
    """Return a section of the first rank's ``/v1/loads``, {} while it does not say."""
    status, text = ask("GET", f"{url}/v1/loads?include={section}", None)
    try:
        load = json.loads(text)["loads"][0] if status == 200 else {}
    except (ValueError, KeyError, TypeError, IndexError):
        return {}
    return dict(load.get("disaggregation" if section == "disagg" else section) or {})


def bring(name: str, switch: Mapping[str, Any], ask: Ask) -> Tuple[bool, str]:
    """Return (whether the worker has its role, what was done or is waited for).

    ``switch``: ``url``, ``role``, and ``decode_peers``: URLs of decode workers, one of which says how much memory CUDA graphs of
    decode take (the engine wants to know before it makes its own). Raises UserError when the engine cannot change the role.
    """
    role = switch["role"]
    mode = _loads(switch["url"], "disagg", ask).get("mode")
    if mode == role:
        return True, ""
    if mode is None:
        return False, f"{name} does not say what its role is"
    body: Dict[str, Any] = {"new_role": role}
    if role == "decode":
        sizes = (_loads(peer, "memory", ask).get("graph_gb") for peer in switch["decode_peers"])
        body["decode_cuda_graph_memory_gb"] = next((size for size in sizes if size is not None), 0.0)
    status, text = ask("POST", switch["url"] + PATH, body)
    if status == 200:
        return True, f"switched {name} from {mode} to {role}"
    if "not idle" in text:
        return False, f"{name} has requests left before it becomes {role}"
    raise UserError(
        f"{name} does not become {role} while it runs (HTTP {status}: {text.strip()[:300]}). Its unit is written, so "
        "restarting it does: systemctl restart, or supervisorctl; or take enable-pd-role-switch out of engine_args and deploy_pd.yml"
    )
