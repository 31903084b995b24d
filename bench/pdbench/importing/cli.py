"""The `import` verb: files of other tools become a folder that `pdbench compare` and `pdbench report` read as a sweep."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdbench.importing.formats import BadFile, read, reads
from pdbench.reading import json_of
from pdbench.records import write_json
from pdbench.sweep import tidy
from pdbench.verbs import ends_by_code

Json = dict[str, Any]
_RATIO = re.compile(r"(?P<prefill>[1-9]\d*)p(?P<decode>[1-9]\d*)d|(?P<aggregated>[1-9]\d*)?agg", re.IGNORECASE)


@ends_by_code
def main(argv: list[str]) -> int:
    """Return 0 when every file was imported, 1 when one could not be (the others are), 2 for bad usage."""
    parser = argparse.ArgumentParser(
        prog="pdbench import",
        description="Import SGLang's serving benchmark (*.jsonl) and logs of the vLLM suite (run_*_conc4_pt256_mt512.log).",
        epilog="Imported runs are never called valid: nobody can judge them. docs/compare.md",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a file, or a folder: all such files in it")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for results.parquet and results.csv")
    parser.add_argument(
        "--ratio",
        action="append",
        default=[],
        metavar="[MODE=]RATIO",
        help="what ran: 3p1d, 4agg; disagg=1p1d for one mode of logs",
    )
    parser.add_argument(
        "--gpus",
        action="append",
        default=[],
        metavar="[MODE=]N",
        help="all GPUs of the deployment, without which nothing is per GPU",
    )
    parser.add_argument("--model", metavar="NAME", help="the model, where the files do not name it")
    try:
        args = parser.parse_args(argv)
        ratios, gpus = _by_mode(args.ratio, "--ratio", _RATIO), _by_mode(args.gpus, "--gpus", re.compile(r"[1-9]\d*"))
        _check_output(args.output)
    except ValueError as why:
        print(f"pdbench import: {why}", file=sys.stderr)
        return 2
    rows: list[Json] = []
    bad: list[str] = []
    files = 0
    for path in _listed(args.files, bad):
        try:
            rows += read(path)
            files += 1
        except BadFile as why:
            bad.append(str(why))
    for message in bad:
        print(f"pdbench import: {message}", file=sys.stderr)
    if not rows:
        print("pdbench import: nothing was imported", file=sys.stderr)
        return 1
    try:
        _write(args.output, [_told(row, ratios, gpus, args.model) for row in rows])
    except OSError as why:
        print(f"pdbench import: cannot write in {args.output}: {why.strerror or why}", file=sys.stderr)
        return 1
    print(f"import: {args.output} ({len(rows)} rows of {files} files)")
    return 1 if bad else 0


def _by_mode(given: Sequence[str], option: str, pattern: re.Pattern[str]) -> dict[str, str]:
    found = {}
    for text in given:
        mode, equals, value = text.rpartition("=")
        if not pattern.fullmatch(value) or (equals and mode not in ("agg", "disagg")):
            right = "3p1d, agg or disagg=1p1d" if option == "--ratio" else "4 or disagg=4"
            raise ValueError(f"{option} {text}: write it as {right}")
        found[mode] = value.lower()
    return found


def _check_output(folder: Path) -> None:
    try:
        spec = json_of((folder / tidy.SWEEP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        spec = None
    if spec is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {folder} is there and no import: give a new folder")
    if isinstance(spec, dict) and spec.get("source") != "import":
        raise ValueError(f"--output {folder} is a sweep of its own: give a new folder")


def _listed(given: Sequence[Path], bad: list[str]) -> list[Path]:
    files: dict[Path, None] = {}
    for path in given:
        found = sorted(one for one in path.rglob("*") if one.is_file() and reads(one)) if path.is_dir() else [path]
        if not found:
            bad.append(f"{path}: holds no *.jsonl and no run_*_conc*_pt*_mt*.log")
        files |= dict.fromkeys(found)
    return list(files)


def _told(row: Json, ratios: dict[str, str], gpus: dict[str, str], model: str | None) -> Json:
    """Return the row with what the user says of it."""
    mode = row.get("ratio") or ""
    ratio = ratios.get(mode, ratios.get("", mode))
    count = gpus.get(mode, gpus.get(""))
    row = {**row, "ratio": ratio, "model": model or row.get("model"), "gpus": int(count) if count else None}
    if match := _RATIO.fullmatch(ratio):
        split = match["prefill"] is not None
        row |= {"prefill_workers": int(match["prefill"] or 0), "decode_workers": int(match["decode"] or 0)}
        row["aggregated_workers"] = 0 if split else int(match["aggregated"] or 1)
    if count and row.get("output_throughput") is not None:
        row["output_throughput_per_gpu"] = row["output_throughput"] / int(count)
    return row


def _write(folder: Path, rows: list[Json]) -> None:
    seen: Counter[str] = Counter()
    cells: dict[str, Json] = {}
    tidied = []
    for row in rows:
        load = (
            {"bench_concurrency": row["concurrency"], "bench_request_rate": row["request_rate"]}
            if "request_rate" in row
            else {"bench_concurrency": row["concurrency"]}
        )
        load = {name: value for name, value in load.items() if value is not None}
        load |= {"bench_input_len": row["isl"], "bench_output_len": row["osl"]}
        deploy = {"ratio": row["ratio"]} if row["ratio"] else {}
        variables = {**deploy, **load}
        pace = f"c{row['concurrency']}" if row["concurrency"] is not None else f"rate{row.get('request_rate') or 0:g}"
        lengths = [f"{letter}{row[name]:.0f}" for letter, name in (("i", "isl"), ("o", "osl")) if row[name] is not None]
        names = [row["ratio"] or "unknown", *([row["model"]] if row["model"] else []), pace, *lengths]
        cell = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(names))
        seen[cell] += 1
        cells[cell] = {"id": cell, "variables": variables, "deploy": deploy, "load": load}
        own = {"sweep": folder.resolve().name, "cell": cell, "repeat": seen[cell], "attempt": 1, "point": 0}
        tidied.append({**row, **own, "variables": json.dumps(variables, sort_keys=True)})
    table = tidy.frame(tidied)
    folder.mkdir(parents=True, exist_ok=True)
    spec = {"schema": 1, "name": folder.resolve().name, "source": "import", "cells": list(cells.values()), "order": []}
    write_json(folder / tidy.SWEEP, spec)
    tidy.save(folder, table)
