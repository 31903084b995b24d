"""The `report` verb: plots and report.html from the folder of a run or of a sweep."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pdbench.engines import cautions
from pdbench.gate.rundata import NotARun, RunData, load
from pdbench.records import replacing
from pdbench.report import words
from pdbench.report.figures import Sheet, draw, shown
from pdbench.report.look import LIGHT
from pdbench.report.page import render
from pdbench.sweep import report as sweep_report
from pdbench.verbs import ends_by_code

REPORT = "report.html"
#: what makes a folder a sweep's
SWEEP = "sweep.json"


@ends_by_code
def main(argv: list[str]) -> int:
    """Return 0 when the report stands, 1 when it could not be made, 2 for bad usage."""
    parser = argparse.ArgumentParser(
        prog="pdbench report",
        description="Draw a run or a sweep: PNG and SVG plots and report.html, one file that can be sent to anybody.",
        epilog="Run `pdbench gate DIR` first: without its verdict everything is marked as not checked.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a run or of a sweep, such as results/latest")
    args = parser.parse_args(argv)
    try:
        path = sweep_report.write(args.folder) if (args.folder / SWEEP).is_file() else make(args.folder)
    except NotARun as why:
        print(f"pdbench report: {why}", file=sys.stderr)
        return 1
    except OSError as why:
        print(f"pdbench report: cannot write in {args.folder}: {why.strerror or why}", file=sys.stderr)
        return 1
    print(f"report: {path}")
    return 0


def _below(run: RunData) -> list[str]:
    """Return what stands below every figure: it may be shown without the page."""
    return cautions(run.no_gpu, run.truncated)


def make(folder: Path) -> Path:
    """Write the plots and the page into a run's folder and return the page's path. Raise NotARun, OSError."""
    run = load(folder)
    verdict = words.verdict(run)
    sheet = Sheet(run.points, LIGHT, verdict.stamp, "\n".join(_below(run)))
    light = {}
    for name in shown(sheet):
        png, light[name] = draw(name, sheet, "png", "svg")
        for kind, content in (("png", png), ("svg", light[name])):
            with replacing(folder / f"{name}.{kind}") as temporary:
                temporary.write_bytes(content)
    page = folder / REPORT
    with replacing(page) as temporary:
        temporary.write_text(render(run, verdict, sheet, light), encoding="utf-8")
    return page
