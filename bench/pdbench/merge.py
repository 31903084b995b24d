"""`pdbench merge`: the shares of several clients become one run, as if one client had made all of the load.

Each client's times become those of the first one's clock: `pdbench.run.meet` found by how much its point began later
(``shift_s``). Figures are computed anew from all records. What the clients say of themselves is kept one by one, and the
run as a whole is as late, as slow and as busy as the worst of them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from pdbench import shapes
from pdbench.gate.rundata import CLIENTS, SELFCHECK
from pdbench.metrics import Stats
from pdbench.reading import json_of
from pdbench.records import Record, read_parquet, write_json
from pdbench.run.folder import Folder, read_setup
from pdbench.run.share import SHARE
from pdbench.run.summary import Json, Setup, output_of
from pdbench.run.table import ending
from pdbench.run.watch import UNKNOWN
from pdbench.verbs import ends_by_code

#: what the first client alone asked the servers, and what all were given
_FIRSTS = ("evidence.json", "server_metrics.parquet", "plan.json", "run.json")


class MergeError(Exception):
    """The folders cannot be put together; the message says which and why."""


@dataclass
class Part:
    """One client's share: who it is, its records by its own clock, ``points`` of share.json and ``client`` by load point."""

    name: str
    folder: Path
    number: int
    of: int
    setup: Setup
    records: list[Record]
    points: dict[int, dict[str, Any]]
    clients: dict[int, Json]
    ended_early: dict[int, str]
    not_run: str
    progress: dict[str, Any]
    selfcheck: dict[str, Any] = field(default_factory=dict)


@ends_by_code
def main(argv: list[str]) -> int:
    """Return 0 when the merged run is valid as far as the clients can see, 3 when it is not, 1 when there is nothing to merge."""
    parser = argparse.ArgumentParser(
        prog="pdbench merge",
        description="Put together what the clients of one run recorded (pdbench run --share): one ordinary run's folder.",
        epilog="A folder's name is its client's. Exit code: 0 valid, 3 invalid, 1 could not merge, 2 bad usage.",
    )
    parser.add_argument("output", type=Path, metavar="DIR", help="folder of the merged run")
    parser.add_argument("shares", type=Path, nargs="+", metavar="SHARE", help="folders of all clients, also of those that failed")
    args = parser.parse_args(argv)
    try:
        summary = merge(args.output, args.shares)
    except MergeError as why:
        print(f"pdbench merge: {why}", file=sys.stderr)
        return 1
    except OSError as why:
        print(f"pdbench merge: cannot write in {args.output}: {why.strerror or why}", file=sys.stderr)
        return 1
    print(ending(summary))
    for reason in cast(list[str], summary["invalid_reasons"]):
        print(f"pdbench: invalid: {reason}", file=sys.stderr)
    return 0 if summary["valid"] else 3


def merge(output: Path, folders: Sequence[Path]) -> Json:
    """Write the merged run into ``output`` and return its summary; raise MergeError, OSError."""
    folder = Folder(output)
    if folder.summary.exists():
        raise MergeError(f"{output} already holds a run ({folder.summary.name}); choose another folder")
    parts, lost = [], {}
    for path in folders:
        try:
            parts.append(read_part(path))
        except (OSError, ValueError, KeyError, TypeError) as why:
            lost[path.name] = _why_none(path, why)
    if not parts:
        raise MergeError("; ".join(f"{name}: {why}" for name, why in lost.items()))
    parts.sort(key=lambda part: part.number)
    _check(parts)
    output.mkdir(parents=True, exist_ok=True)
    for name in _FIRSTS:
        source = next((part.folder / name for part in parts if (part.folder / name).exists()), None)
        if source is not None:
            shutil.copyfile(source, output / name)
    if any(part.selfcheck for part in parts):
        write_json(output / SELFCHECK, worst_selfcheck(parts))
    missing = [f"client {name} has nothing to add: {why}" for name, why in lost.items()]
    absent = {*range(1, parts[0].of + 1)} - {part.number for part in parts}
    if len(absent) > len(lost):
        missing.append(f"of {parts[0].of} clients {len(absent)} are missing: {', '.join(map(str, sorted(absent)))}")
    unfinished = {part.name: str(part.progress.get("message")) for part in parts if part.progress.get("state") != "done"}
    missing += [f"client {name} did not come to its end: {why}" for name, why in unfinished.items()]
    told = {"clients": [part.name for part in parts], "lost": lost, "unfinished": unfinished}
    write_json(output / CLIENTS, {"schema": 1, **told})
    write_json(folder.progress, _progress(parts, missing))
    numbers = sorted({number for part in parts for number in part.points})
    setup = replace(parts[0].setup, points=_asked(parts))
    clients = {number: together(parts, number) for number in numbers}
    not_run = next((part.not_run for part in parts if part.not_run), "")
    summary = folder.conclude(in_one_clock(parts), setup, clients, missing, not_run)
    for point in cast(list[Json], summary["points"]):
        number = cast(int, point["point"])
        point["clients"] = [_of_point(part, number) for part in parts if number in part.points]
    write_json(folder.summary, summary)
    return summary


def read_part(path: Path) -> Part:
    """Return the share that stands in a folder; raise OSError, ValueError, KeyError, TypeError when there is none."""
    folder = Folder(path)
    told, summary = _json(path / SHARE, shapes.SHARE), _json(folder.summary, shapes.SUMMARY)
    number, of = told["share"]
    points = {int(point["point"]): point for point in told["points"]}
    for point in points.values():
        _ = [float(point[name]) for name in ("shift_s", "offset_s", "error_s", "drift_s", "asked")]
    figures = summary["points"]
    return Part(
        name=path.name,
        folder=path,
        number=int(number),
        of=int(of),
        setup=read_setup(folder.setup),
        records=read_parquet(folder.parquet),
        points=points,
        clients={point["point"]: point["client"] for point in figures},
        ended_early={point["point"]: point["ended_early"] for point in figures if "ended_early" in point},
        not_run=next((point["why"] for point in summary["not_run"]), ""),
        progress=_json(folder.progress, shapes.PROGRESS),
        selfcheck=_json(path / SELFCHECK) if (path / SELFCHECK).exists() else {},
    )


def _json(path: Path, shape: dict[str, Any] | None = None) -> dict[str, Any]:
    found = json_of(path.read_text(encoding="utf-8"))
    if fault := shapes.wrong(found, shape or {}):
        raise TypeError(f"{path.name}: {fault}")
    return dict(found)


def _why_none(path: Path, why: Exception) -> str:
    if not path.is_dir():
        return "it left no run behind"
    if isinstance(why, FileNotFoundError):
        log = path / "run.log"
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] if log.exists() else []
        return f"{Path(str(why.filename)).name} is missing{f'; its last word: {last[0]}' if last else ''}"
    return f"it cannot be read: {type(why).__name__} {why}"


def _check(parts: Sequence[Part]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.of != first.of or replace(part.setup, gpus=None) != replace(first.setup, gpus=None):
            raise MergeError(f"{first.name} and {part.name} are no shares of one run: they were given different loads (run.json)")
        if part.number in {other.number for other in parts if other is not part}:
            raise MergeError(f"share {part.number}/{part.of} is there twice ({part.name} is one of them)")


def in_one_clock(parts: Sequence[Part]) -> list[Record]:
    """Return all records, their times in seconds from the beginning of their point at the first client, by its clock."""
    return [moved(r, part.points.get(r.point, {}).get("shift_s", 0.0)) for part in parts for r in part.records]


def moved(record: Record, seconds: float) -> Record:
    """Return the record as another clock has it."""
    if not seconds:
        return record
    times = {name: getattr(record, name) + seconds for name in ("scheduled_s", "sent_s", "first_s", "end_s")}
    return replace(record, **times, chunk_s=[at + seconds for at in record.chunk_s])


def together(parts: Sequence[Part], number: int) -> Json:
    """Return ``client`` of a merged point: sums of what adds up, of all else the worst client's."""
    # One for whom there was no slot was idle.
    busy = [part for part in parts if part.points.get(number, {}).get("asked")]
    seen = [part.clients.get(number, UNKNOWN) for part in busy]
    if not seen or any(client["cpu_s"] is None for client in seen):
        return UNKNOWN
    tokens, events = map(sum, zip(*(output_of(part.records, number) for part in busy), strict=True))
    reads = sum(output_of(p.records, number)[1] / (c["events_per_read"] or 1) for p, c in zip(busy, _floats(seen), strict=True))
    delivered = [c["delivered_load"] for c in _floats(seen) if c["delivered_load"] is not None]
    return {
        "cpu_s": sum(c["cpu_s"] for c in _floats(seen)),
        "processes": sum(c["processes"] for c in _floats(seen)),
        "busy": max((c["busy"] for c in _floats(seen) if c["busy"] is not None), default=None),
        "loop_lag_ms": _worst([cast(Stats, c["loop_lag_ms"]) for c in seen]),
        "stamped_share": min((c["stamped_share"] for c in _floats(seen) if c["stamped_share"] is not None), default=None),
        "send_lateness_ms": _worst([cast(Stats, c["send_lateness_ms"]) for c in seen]),
        "tokens_per_event": tokens / events if events else None,
        "events_per_read": events / reads if reads else None,
        "delivered_load": max(delivered, key=lambda share: abs(share - 1), default=None),
    }


def _floats(clients: Sequence[Json]) -> list[dict[str, Any]]:
    return [dict(client) for client in clients]


def _worst(found: Sequence[Stats]) -> Stats:
    return {name: max((v for s in found if (v := s[name]) is not None), default=None) for name in ("p50", "p99", "max")}


def _asked(parts: Sequence[Part]) -> list[Json]:
    """Return what was asked for; where a point was ended early or a share is missing, what the clients were to send."""
    points = [dict(point) for point in parts[0].setup.points]
    for part in parts:
        for number, why in part.ended_early.items():
            points[number]["ended_early"] = why
    for number, point in enumerate(points):
        if "ended_early" in point:
            point["num_requests"] = sum(int(part.points.get(number, {}).get("asked", 0)) for part in parts)
    return points


def _of_point(part: Part, number: int) -> Json:
    clock = {name: part.points[number][name] for name in ("offset_s", "error_s", "drift_s", "shift_s")}
    asked = part.points[number]["asked"]
    return {"name": part.name, "share": part.number, "asked": asked, "clock": clock, "client": part.clients.get(number, UNKNOWN)}


def _progress(parts: Sequence[Part], missing: Sequence[str]) -> Mapping[str, object]:
    first = parts[0].progress
    return {**first, "state": "stopped", "message": missing[0]} if missing else first


def worst_selfcheck(parts: Sequence[Part]) -> dict[str, Any]:
    """Return the selfcheck of the client that is the furthest from the truth, or which client has none that says anything.

    As many times the tokens/s can come in as there are clients.
    """
    for part in parts:
        if not part.selfcheck or part.selfcheck.get("error"):
            why = part.selfcheck.get("error", f"{SELFCHECK} is missing")
            return {**part.selfcheck, "error": f"client {part.name}: {why}"}
    worst = max((part.selfcheck for part in parts), key=_wrong)
    points = [{**p, "most_tokens_per_s": (p["most_tokens_per_s"] or 0.0) * len(parts)} for p in worst["points"]]
    return {**worst, "points": points}


def _wrong(found: Mapping[str, Any]) -> tuple[bool, float]:
    points = found["points"]
    return any(p["reasons"] for p in points), max(abs(p["ttft_wrong_by"]["mean"] or 0.0) for p in points)
