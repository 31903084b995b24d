"""What prefill workers counted of their KV transfers during a run, from its evidence.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PREFIX = "sglang:kv_transfer_"
_NAMES = ("latency_ms", "speed_gb_s", "total_mb", "bootstrap_ms", "alloc_ms")


def _total(metrics: dict[str, float], name: str) -> float:
    return sum(value for key, value in metrics.items() if key.partition("{")[0] == name)


def table(run: Path) -> list[dict[str, Any]]:
    """Return a row for each load point and worker that transferred: counts, MiB, and means of what was counted in between."""
    rows = []
    for point in json.loads((run / "evidence.json").read_text())["points"]:
        for worker in point["before"]["workers"]:
            before, after = (point[end]["workers"][worker]["metrics"] for end in ("before", "after"))
            row: dict[str, Any] = {"point": point["point"], "worker": worker}
            for name in _NAMES:
                count, total = (
                    _total(after, f"{_PREFIX}{name}_{part}") - _total(before, f"{_PREFIX}{name}_{part}")
                    for part in ("count", "sum")
                )
                if count:
                    row[f"{name}_mean"] = round(total / count, 4)
                    row["transfers"] = max(int(count), row.get("transfers", 0))
            if "total_mb_mean" in row:
                rows.append(row)
    return rows
