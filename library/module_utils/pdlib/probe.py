"""The KV path probe: between which ends bytes are moved before workers start, and what their journey means. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from .errors import listing
from .probe_verdict import LIBRARIES
from .tables import table

Json = Dict[str, Any]
#: What of a worker's environment reaches the transfer engine. The rest may change without a new probe.
_TELLS = re.compile(r"(UCX|MC|MOONCAKE|NIXL|CUDA|LD|PYTHON|PYTORCH|SGLANG_DISAGG|SGLANG_MOONCAKE|SGLANG_NIXL)_?.*")
#: Seconds that an initiator waits for its turn, for every pair that there is: as long as one that hangs may hold a host.
_PATIENCE_S = 75
#: A matrix with more decode ends than this is too wide for a terminal.
_COLUMNS = 8


def unfit(plan: Mapping[str, Any]) -> str:
    """Return why a plan has nothing to probe ("" when it has)."""
    if plan["emulated"]:
        return "the emulated engine has no transfer engine"
    if not plan["pairs"]:
        return "aggregated workers move no KV cache"
    if any(pair["expected_transport"] == "hccs" for pair in plan["pairs"]):
        return "it moves nothing between NPUs"
    if plan["transfer_backend"] not in LIBRARIES:
        return f"it knows nixl and mooncake, and transfer_backend is {plan['transfer_backend']}"
    return ""


def ends(plan: Mapping[str, Any], locks: Mapping[str, str]) -> Dict[str, List[Json]]:
    """Return the ends of every worker: one for each GPU of its ranks, or on CPUs one for each rank.

    ``locks``: host -> a hash of the requirements of its engine. Workers whose ends could not be told apart by the transfer
    engine share them. An end has ``id``, ``workers``, ``host``, ``address``, ``listen``, ``gpu`` (the host's index, None
    without one), ``slot`` (the GPU as its worker counts it), ``python``, ``env``, ``ib_device``, ``container`` and ``key``.
    """
    known: Dict[str, Json] = {}
    found: Dict[str, List[Json]] = {}
    for worker in plan["workers"]:
        found[worker["name"]] = []
        for rank in worker["ranks"]:
            slots: List[Optional[int]] = [None] if plan["on_cpu"] or not rank["gpus"] else list(range(len(rank["gpus"])))
            for slot in slots:
                end = _end(worker, rank, slot, locks)
                same = known.setdefault(end["key"], end)
                if worker["name"] not in same["workers"]:
                    same["workers"].append(worker["name"])
                found[worker["name"]].append(same)
    return found


def _end(worker: Json, rank: Json, slot: Optional[int], locks: Mapping[str, str]) -> Json:
    host, argv = rank["host"], rank["argv"]
    gpu = None if slot is None else rank["gpus"][slot]
    flag = "--disaggregation-ib-device"
    ib_device = argv[argv.index(flag) + 1] if flag in argv else ""
    env = {key: value for key, value in rank["env"].items() if _TELLS.fullmatch(key)}
    if slot is None:
        # It differs from worker to worker, and nothing on a CPU reads it.
        env.pop("CUDA_VISIBLE_DEVICES", None)
    container = rank.get("container")
    key = [host, rank["address"], gpu, argv[0], sorted(env.items()), ib_device, locks.get(host, ""), worker["role"]]
    key.append(container["image"] if container else "")
    node = f".{rank['node_rank']}" if len(worker["ranks"]) > 1 else ""
    return {
        "id": f"{worker['name']}{node}" + ("" if slot is None else f".gpu{gpu}"), "workers": [worker["name"]], "host": host,
        "address": rank["address"], "listen": rank["listen"], "gpu": gpu, "slot": slot, "python": argv[0], "env": rank["env"],
        "ib_device": ib_device, "container": container, "key": _hash(key),
    }  # fmt: skip


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def pairs(plan: Mapping[str, Any], by_worker: Mapping[str, Sequence[Json]]) -> List[Json]:
    """Return the pairs of ends whose path the plan's workers use: ``prefill``, ``decode`` (ends) and ``expected``.

    GPU i of a prefill worker meets GPU i of a decode worker (of the smaller one several times). On one host every such pair
    counts; between two hosts as many as it takes that every end of either has been part of one.
    """
    found: Dict[Tuple[str, str], List[Json]] = {}
    for pair in plan["pairs"]:
        left, right = by_worker[pair["prefill"]], by_worker[pair["decode"]]
        count = max(len(left), len(right))
        for index in range(count):
            one, other = left[index * len(left) // count], right[index * len(right) // count]
            rows = found.setdefault((one["host"], other["host"]), [])
            if not any(row["prefill"] is one and row["decode"] is other for row in rows):
                rows.append({"prefill": one, "decode": other, "expected": pair["expected_transport"]})
    return [row for hosts, rows in found.items() for row in (rows if hosts[0] == hosts[1] else _cover(rows))]


def _cover(rows: Sequence[Json]) -> List[Json]:
    """Return some of the rows, such that every end of theirs is in one: first those that are new at both ends."""
    seen: Set[str] = set()
    kept: List[int] = []
    for new_at in (2, 1):
        for index, row in enumerate(rows):
            names = {f"prefill {row['prefill']['id']}", f"decode {row['decode']['id']}"}
            if len(names - seen) >= new_at:
                seen |= names
                kept.append(index)
    return [rows[index] for index in sorted(kept)]


def work(
    plan: Mapping[str, Any],
    before: Optional[Mapping[str, Any]],
    mode: str,
    hosts: Optional[Collection[str]],
    locks: Mapping[str, str],
    reads: bool,
) -> Json:
    """Return what there is to probe, and what is known from before.

    ``before``: the deployed plan's ``kv_probe``; ``mode``: the variable of that name; ``hosts``: those of ``--limit`` (None
    without one); ``locks``: as in :func:`ends`; ``reads``: whether decode fetches the KV cache, and prefill does not send it.
    Returned: ``says`` (a line for people), ``known`` (fingerprint -> what was measured, of this plan's pairs), ``pairs`` to
    probe, the ``ends`` of these, and by host which of its ends wait (``waiting``) and which come to them (``moving``).
    """
    result: Json = {"says": "", "mode": mode, "op": "read" if reads else "write", "backend": plan["transfer_backend"]}
    result.update(known={}, pairs=[], ends={}, waiting={}, moving={}, patience_s=0)
    why = unfit(plan) or ("kv_probe is never" if mode == "never" else "")
    if why:
        return {**result, "known": dict(before or {}), "says": f"KV path probe: none ({why})"}
    skipped, rows = 0, pairs(plan, ends(plan, locks))
    about = [plan["engine"], plan["engine_version"], plan["transfer_backend"], result["op"]]
    for row in rows:
        mark = _hash([*about, row["expected"], row["prefill"]["key"], row["decode"]["key"]])
        if before and mark in before:
            result["known"][mark] = before[mark]
            if mode == "auto":
                continue
        if hosts is not None and not {row["prefill"]["host"], row["decode"]["host"]} <= set(hosts):
            skipped += 1
            continue
        came, waits = (row["decode"], row["prefill"]) if reads else (row["prefill"], row["decode"])
        result["pairs"].append({
            "id": str(len(result["pairs"])), "fingerprint": mark, "expected": row["expected"],
            "prefill": row["prefill"]["id"], "decode": row["decode"]["id"], "from": came["id"], "to": waits["id"],
        })  # fmt: skip
        for kind, end in (("waiting", waits), ("moving", came)):
            result["ends"][end["id"]] = end
            mine = result[kind].setdefault(end["host"], [])
            if end["id"] not in mine:
                mine.append(end["id"])
    result["patience_s"] = _PATIENCE_S * len(result["pairs"]) + 60
    result["says"] = _says(len(rows), len(result["pairs"]), skipped)
    return result


def _says(there: int, todo: int, skipped: int) -> str:
    text = f"KV path probe: {todo} of {there} paths" if todo else f"KV path probe: {there - skipped} of {there} paths are known"
    return text + (f"; {skipped} have an end that --limit leaves out" if skipped else "")


def tasks(work: Mapping[str, Any], host: str, kind: str, served: Mapping[str, Mapping[str, Any]]) -> List[Json]:
    """Return what the programs of one host do: those that wait (``kind`` waiting), or those that come (moving).

    ``served``: end -> ``port`` and ``token`` of the programs that wait, for those that come.
    """
    rows: List[Json] = []
    for name in work[kind].get(host, []):
        end = work["ends"][name]
        row: Json = {
            "id": name, "mode": "wait" if kind == "waiting" else "move", "host": host, "address": end["address"],
            "listen": end["listen"], "gpu": end["slot"], "ib_device": end["ib_device"], "backend": work["backend"],
            "op": work["op"], "patience_s": work["patience_s"], "idle_s": work["patience_s"], "connect_s": 5.0,
        }  # fmt: skip
        if kind == "moving":
            row["pairs"] = [
                {"id": pair["id"], "name": f"{name} and {pair['to']}", "host": other["host"], "address": other["address"],
                 **served[pair["to"]]}
                for pair in work["pairs"] if pair["from"] == name and pair["to"] in served for other in [work["ends"][pair["to"]]]
            ]  # fmt: skip
            if not row["pairs"]:
                # Nobody waits for it.
                continue
        rows.append({"task": row, "python": end["python"], "env": end["env"], "container": end["container"]})
    return rows


def label(end: Mapping[str, Any]) -> str:
    """Return an end as people call it: ``prefill-0 (h1)``, ``prefill-0 and prefill-1 (h1, GPU 2)``."""
    names = list(end["workers"])
    where = end["host"] if end["gpu"] is None else f"{end['host']}, GPU {end['gpu']}"
    return f"{listing(names) if len(names) < 3 else f'{names[0]} to {names[-1]}'} ({where})"


def cell(row: Optional[Mapping[str, Any]]) -> str:
    """Return a path's figures in few characters."""
    if row is None:
        return ""
    if row.get("gb_s") is None:
        return "BROKEN"
    speed = f"{row['gb_s']:.3g} GB/s {row['latency_us']:.0f} us"
    return speed if row["ok"] else f"{speed} ! {row['seen']}"


def matrix(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the paths (``prefill`` and ``decode``: labels) as a table: prefill downwards, decode across."""
    left = list(dict.fromkeys(row["prefill"] for row in rows))
    right = list(dict.fromkeys(row["decode"] for row in rows))
    by_pair = {(row["prefill"], row["decode"]): row for row in rows}
    if len(right) <= _COLUMNS:
        return table(
            ["prefill \\ decode", *right], [[one, *(cell(by_pair.get((one, other))) for other in right)] for one in left]
        )
    lines = []
    for one in left:
        mine = sorted((row for row in rows if row["prefill"] == one), key=lambda row: row.get("gb_s") or 0.0)
        middle, slow = mine[len(mine) // 2], mine[0]
        lines.append([one, len(mine), cell(middle), cell(slow), slow["decode"]])
    return table(["prefill", "paths", "middle", "slowest", "to"], lines)
