"""`python -m yardstick`: measure every load generator beside the truth server, in turns; write docs/results/client.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from yardstick import install, picture, table
from yardstick.measure import ITL_MS, TTFT_MS, Case, Meter, measure
from yardstick.tools import OSL, ROOT, TOOLS

CASES = (
    Case(table.START, 1, 2),
    Case("c32", 32, 192),
    Case("c512", 512, 1536),
    Case("c512-core-taken", 512, 1536, core_taken=True),
    Case("k4", 32, 96, per_event=4),
    Case("j4", 32, 96, per_write=4),
)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m yardstick", description=__doc__, allow_abbrev=False)
    p.add_argument("--repeats", type=int, default=5, metavar="N", help="of everything, tools taking turns (default: 5)")
    p.add_argument("--tools", default=",".join(TOOLS), metavar="A[,B]", help="default: %(default)s")
    p.add_argument("--cases", default=",".join(case.name for case in CASES), metavar="A[,B]", help="default: %(default)s")
    p.add_argument("--out", type=Path, default=ROOT / "docs" / "results", metavar="DIR", help="where client.* goes")
    p.add_argument("--again", action="store_true", help="measure nothing: make the page from client.json as it stands")
    args = p.parse_args()
    for option, known in (("tools", set(TOOLS)), ("cases", {case.name for case in CASES})):
        chosen = getattr(args, option).split(",")
        if strange := [name for name in chosen if name not in known]:
            p.error(f"--{option}: {', '.join(strange)}: choose from {', '.join(sorted(known))}")
        setattr(args, option, chosen)
    if args.repeats < 1:
        p.error("--repeats: 1 at least")
    if args.again and not (args.out / "client.json").exists():
        p.error(f"--again: {args.out / 'client.json'} is not there")
    return args


def main() -> int:
    """Measure, or only write the page again; return the exit code."""
    args = _arguments()
    if args.again:
        known = json.loads((args.out / "client.json").read_text())
        _write(args.out, known["meta"], known["rows"], known["tools"])
        return 0
    try:
        for problem in install.install():
            print(f"bench-client: cannot be installed: {problem}", file=sys.stderr)
    except install.CannotInstallError as why:
        print(f"bench-client: {why}", file=sys.stderr)
        return 1
    absent = {name: problem for name in args.tools if (problem := TOOLS[name].problem())}
    for name, problem in absent.items():
        print(f"bench-client: {name} is left out: {problem}", file=sys.stderr)
    chosen = [name for name in args.tools if name not in absent]
    meta: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpus": len(os.sched_getaffinity(0)),
        "python": f"Python {platform.python_version()}",
        "repeats": args.repeats,
        "ttft_ms": TTFT_MS,
        "itl_ms": ITL_MS,
        "osl": OSL,
        "absent": absent,
    }
    rows: list[dict[str, Any]] = []
    meter = Meter()
    try:
        _measure_all(args, chosen, meter, rows)
    except KeyboardInterrupt:
        print("bench-client: stopped; the page holds what was measured", file=sys.stderr)
    finally:
        meter.close()
    if not rows:
        print("bench-client: nothing was measured", file=sys.stderr)
        return 1
    _write(args.out, meta, rows, args.tools)
    return 0


def _measure_all(args: argparse.Namespace, tools: list[str], meter: Meter, rows: list[dict[str, Any]]) -> None:
    cases = [case for case in CASES if case.name in args.cases]
    total, start = args.repeats * len(cases) * len(tools), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="yardstick-") as folder:
        for repeat in range(args.repeats):
            for case in cases:
                # Whoever goes first is another one each time.
                turn = repeat % len(tools) if tools else 0
                for name in tools[turn:] + tools[:turn]:
                    row = {**measure(TOOLS[name], case, meter, Path(folder)), "repeat": repeat}
                    rows.append(row)
                    left = (time.monotonic() - start) / len(rows) * (total - len(rows))
                    print(f"{len(rows)}/{total}  {_short(row)}  ({left / 60:.0f} min left)", flush=True)


def _short(row: dict[str, Any]) -> str:
    head = f"{row['tool']:<13} {row['name']:<16}"
    if row.get("problem"):
        return f"{head} {row['problem'][:150]}"
    return (
        f"{head} CPU {row['cpu_s']:6.2f} s  delivered {row['delivered']:.3f}  "
        f"TTFT {row['ttft_ms'] - row['true_ttft_ms']:+8.1f} ms  ITL {row['itl_ms']:6.2f} ms  "
        f"others {row['other_cores']:.1f} cores"
    )


def _write(out: Path, meta: dict[str, Any], rows: list[dict[str, Any]], tools: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row, sort_keys=True) for row in rows)
    text = f'{{"meta": {json.dumps(meta)},\n"tools": {json.dumps(tools)},\n"rows": [\n{lines}\n]}}\n'
    (out / "client.json").write_text(text)
    (out / "client.md").write_text(table.page(meta, rows, tools))
    what = f"512 in flight, medians of {meta['repeats']} interleaved runs; lines: least to most"
    below = f"{meta['date']}, {meta['cpus']} cores, {what}"
    picture.draw(rows, tools, out / "client.png", below)
    print(f"bench-client: {out / 'client.md'}")


if __name__ == "__main__":
    sys.exit(main())
