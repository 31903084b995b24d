"""Tables for people."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Mapping, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in plain text, columns as wide as they need."""
    cells = [[str(item) for item in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(item.ljust(width) for item, width in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def grouped(changes: Sequence[str]) -> str:
    """Return changes in one line, those of one kind together: ``started pd-prefill-0, pd-decode-0; stopped pd-decode-1``."""
    kinds: Dict[str, List[str]] = {}
    for change in changes:
        # The verb, and the word that makes it another one: "would start", "made user".
        words = change.split(" ")
        size = 2 if words[0] in ("would", "made", "got", "ended", "removed", "kept") and len(words) > 2 else 1
        kinds.setdefault(" ".join(words[:size]), []).append(" ".join(words[size:]))
    for kind in ("wrote", "would write"):
        if len(kinds.get(kind, [])) > 2:
            kinds[kind] = [f"{len(kinds[kind])} files"]
    return "; ".join(f"{kind} {', '.join(what)}".strip() for kind, what in kinds.items())


def duration(seconds: float) -> str:
    """Return a duration as people say it: ``3.2 s``, ``47 s``, ``5 min 20 s``, ``2 h 5 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60} min"


def workers(plan: Mapping[str, Any]) -> str:
    """Return the plan as a table of workers and router, with the transfer backend and its reason below."""
    rows: List[List[Any]] = []
    for worker in plan["workers"]:
        for rank in worker["ranks"]:
            name = worker["name"] if len(worker["ranks"]) == 1 else f"{worker['name']} rank {rank['node_rank']}"
            gpus = ",".join(str(gpu) for gpu in rank["gpus"])
            where = f"{rank['listen']}:{rank['port']}"
            rows.append([name, rank["host"], gpus, where, rank.get("bootstrap_port", ""), ",".join(rank["rdma_devices"])])
    router = plan["router"]
    rows.append(["router", router["host"], "", f"{router['listen']}:{router['port']}", "", ""])
    lines = [table(["worker", "host", "GPUs", "listens on", "bootstrap", "RDMA"], rows)]
    emulated = " (emulated: no GPU is used)" if plan["emulated"] else " (on CPU: no GPU is used)" if plan["on_cpu"] else ""
    lines.append(f"{plan['ratio']}, {plan['engine']} {plan['engine_version']}{emulated}, {plan['model']}, {router['name']}")
    if plan.get("truncated"):
        lines.append(f"The model is not whole: {plan['truncated']}; results are marked so.")
    if plan["pairs"]:
        kinds = sorted({pair["expected_transport"] for pair in plan["pairs"]})
        lines.append(f"KV cache: {plan['transfer_backend']} over {'/'.join(kinds)} ({plan['transfer_backend_reason']})")
    masks = fabric(plan)
    return "\n".join([*lines, *(["", masks] if masks else [])])


def moves(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the moves of a change of ratio, one a line."""
    lines = [f"move {row['number']} of {len(rows)}: {row['says']}" for row in rows]
    return "\n".join(lines) or "no worker changes"


def fabric(plan: Mapping[str, Any]) -> str:
    """Return what follows from each host's RDMA devices, and why, hosts of one kind together; "" where nothing does."""
    hosts: Dict[str, List[str]] = {}
    for name, entry in plan["hosts"].items():
        for row in entry.get("fabric", []):
            hosts.setdefault(json.dumps([row["setting"], row["value"], row["reason"]]), []).append(name)
    rows = [[_some(names, len(plan["hosts"])), *json.loads(key)] for key, names in hosts.items()]
    return table(["RDMA on", "setting", "value", "because"], rows) if rows else ""


def _some(names: Sequence[str], of: int) -> str:
    if len(names) == of > 2:
        return f"all {of} hosts"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
