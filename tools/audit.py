"""`make audit`: known vulnerabilities of what the locks in requirements/ pin, by pip-audit. Nothing of them is installed."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOUND, COULD_NOT = 1, 2
#: a requirement of ours that pip-audit can look up: an exact version, without what a build adds to it (+cu129)
_PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?==([^\s;+\\]+)")


def pinned(text: str) -> list[str]:
    """Return ``name==version`` of every line of a lock that pins one, each once, in the file's order."""
    found = [_PINNED.match(line) for line in text.splitlines()]
    return list(dict.fromkeys(f"{match[1].lower()}=={match[2]}" for match in found if match))


def vulnerable(told: str) -> tuple[list[str], list[str]]:
    """Return a line for every vulnerability in pip-audit's JSON, and why packages were skipped; raise ValueError for no JSON."""
    lines = []
    rows = json.loads(told)["dependencies"]
    for one in rows:
        for bug in one.get("vulns", []):
            fixed = f"; mended in {', '.join(bug['fix_versions'])}" if bug.get("fix_versions") else ""
            lines.append(f"{one['name']} {one['version']}: {bug['id']}{fixed}")
    return lines, [str(one["skip_reason"]) for one in rows if one.get("skip_reason")]


def audit(program: Path, lock: Path, options: list[str]) -> tuple[list[str], list[str]]:
    """Return the vulnerabilities of one lock, and why packages were skipped.

    Raise RuntimeError with the reason when nothing could be looked up: a mirror of packages knows no vulnerabilities.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text("".join(f"{line}\n" for line in pinned(lock.read_text())))
        command = [
            str(program),
            "-r",
            str(wanted),
            "--no-deps",
            "--disable-pip",
            "-f",
            "json",
            "--progress-spinner",
            "off",
            *options,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    try:
        found, skipped = vulnerable(done.stdout)
        if skipped and len(skipped) >= len(pinned(lock.read_text())):
            raise RuntimeError(skipped[0])
        return found, skipped
    except (ValueError, KeyError, TypeError):
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]) from None


def main(argv: list[str] | None = None) -> int:
    """Return 0 when nothing is known, 1 when something is, 2 when it could not be looked up."""
    parser = argparse.ArgumentParser(
        prog="make audit", usage='make audit ARGS="[--lock FILE] [-- OPTION ...]"', description=__doc__
    )
    parser.add_argument("--program", type=Path, default=ROOT / ".pd" / "audit" / "bin" / "pip-audit", help=argparse.SUPPRESS)
    parser.add_argument("--lock", action="append", help="only this file of requirements/ (may be given again; default: all)")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="of pip-audit: -- --vulnerability-service osv")
    args = parser.parse_args(argv)
    locks = [ROOT / "requirements" / name for name in args.lock or []] or sorted((ROOT / "requirements").glob("*.txt"))
    absent = [lock.name for lock in locks if not lock.is_file()]
    if absent:
        parser.error(f"requirements/ has no {absent[0]}")
    bad = left = 0
    for lock in (lock for lock in locks if pinned(lock.read_text())):
        try:
            found, skipped = audit(args.program, lock, args.options)
        except (RuntimeError, OSError) as why:
            print(
                f"make audit: requirements/{lock.name} could not be looked up; of it and what follows nothing is known: {why}\n"
                "It asks a public service: run it where the network reaches one, or name another (--vulnerability-service).",
                file=sys.stderr,
            )
            return COULD_NOT
        bad, left = bad + len(found), left + len(skipped)
        unknown = [f"not looked up: {why}" for why in skipped]
        print(f"{lock.name}: {len(found) or 'nothing'} known", *found, *unknown, sep="\n  ", flush=True)
    print(f"{len(locks)} locks: {bad or 'no'} known vulnerabilities, {left or 'no'} packages not looked up")
    return FOUND if bad else 0


if __name__ == "__main__":
    sys.exit(main())
