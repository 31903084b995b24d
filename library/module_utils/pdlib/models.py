"""Where a model lies on hosts, and which host gives it to which. Pure."""

from __future__ import annotations

import re
from typing import Any, Dict, List, Mapping, Optional, Tuple

from .errors import UserError, listing

Json = Dict[str, Any]
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?")


def location(model: str, source: str, model_dir: str, revision: Optional[str] = None) -> str:
    """Return the model as the engine on a host takes it: with ``source: path`` as given, else the folder where it lies."""
    if source == "path":
        return model
    if model.startswith("/"):
        if source == "hub":
            raise UserError(
                f"model={model} is a path, and model_source is hub: give the hub's name, such as Qwen/Qwen2.5-3B-Instruct"
            )
        return model.rstrip("/")
    if not _HUB_NAME.fullmatch(model):
        raise UserError(f"model={model!r} is neither an absolute path nor a hub's name, such as Qwen/Qwen2.5-3B-Instruct")
    folder = model.replace("/", "--")
    return f"{model_dir.rstrip('/')}/{folder}" + (f"@{revision.replace('/', '--')}" if revision else "")


def choose(found: Mapping[str, Json], wanted: Optional[str], name: str) -> Tuple[str, List[str]]:
    """Return the host that gives a model to the others, and these; ("", []) when all have it.

    ``found``: host -> ``problem`` ("" when it is whole) and ``digest``, in inventory order; ``wanted``: ``model_sha256``.
    """
    whole = {host: row["digest"] for host, row in found.items() if not row["problem"]}
    givers = [host for host, digest in whole.items() if wanted in (None, digest)]
    if not givers:
        said = listing(f"{host} ({row['problem'] or 'another checksum'})" for host, row in found.items())
        raise UserError(f"model {name} is on none of the hosts: {said}. Copy it to one of them, or set model_source to hub")
    lacking = [host for host in found if whole.get(host) != whole[givers[0]]]
    return (givers[0], lacking) if lacking else ("", [])
