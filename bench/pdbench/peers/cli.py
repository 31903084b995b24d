"""The `peer` verb: SGLang's or vLLM's bench client after a run of ours, and both in one table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pdbench.gate.rundata import Point, summary_points
from pdbench.peers import beside, drive
from pdbench.peers.commands import TOOLS
from pdbench.verbs import ends_by_code


@ends_by_code
def main(argv: list[str]) -> int:
    """Return 0 when all was measured or shown, 1 when the peer could not measure a load point, 2 for bad usage."""
    parser = argparse.ArgumentParser(
        prog="pdbench peer",
        description="Run another bench client at the load points of a run, and show its figures beside ours.",
        epilog="Without --tool what is there already is shown. Definitions: docs/metrics.md",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a finished run")
    parser.add_argument("--tool", choices=sorted(TOOLS), help="which client")
    parser.add_argument("--python", metavar="PYTHON", help="of a virtualenv with requirements/bench-TOOL*.txt")
    parser.add_argument("--url", metavar="URL", help="what the run was sent to")
    parser.add_argument("--model", metavar="NAME", help="the served model's name")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="its tokenizer.json (none: words, for `pdbench emulate`)")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="the key of the deployment")
    args = parser.parse_args(argv)
    lacking = [f"--{name}" for name in ("python", "url", "model") if args.tool and not getattr(args, name)]
    if lacking:
        parser.error(f"--tool {args.tool} needs {' and '.join(lacking)}")
    try:
        if args.tool:
            key = args.api_key_file.read_text(encoding="utf-8").strip() if args.api_key_file else ""
            peer = drive.Peer(args.tool, args.python, args.url, args.model, args.tokenizer, key)
            summary = drive.run(args.folder, peer)
        else:
            summary = drive.read_summary(args.folder)
    except drive.CannotRunError as why:
        print(f"pdbench peer: {why}", file=sys.stderr)
        return 1
    except OSError as why:
        print(f"pdbench peer: {why.filename}: {why.strerror or why}", file=sys.stderr)
        return 1
    if text := beside.shown(summary, labels(summary)):
        print(text)
    return 1 if beside.problems(summary) else 0


def labels(summary: beside.Json) -> dict[int, str]:
    """Return load point -> what it is called."""
    return {i: Point(i, point, {}, []).label for i, point in enumerate(summary_points(dict(summary)))}
