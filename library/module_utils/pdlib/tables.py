"""Tables for people."""

from __future__ import annotations

from typing import Any, List, Mapping, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in plain text, columns as wide as they need."""
    cells = [[str(item) for item in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(item.ljust(width) for item, width in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


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
    if plan["pairs"]:
        kinds = sorted({pair["expected_transport"] for pair in plan["pairs"]})
        lines.append(f"KV cache: {plan['transfer_backend']} over {'/'.join(kinds)} ({plan['transfer_backend_reason']})")
    return "\n".join(lines)
