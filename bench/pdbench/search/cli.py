"""The `search` verb: `pdbench run` again and again, each run in a folder of its own, which a second start does not repeat."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from pdbench.engines import no_gpu
from pdbench.reading import json_of
from pdbench.records import write_json
from pdbench.run.summary import SLOW_CLIENT
from pdbench.search.goodput import Counts, Outcome, Step, search
from pdbench.steady import LEAST_SENT
from pdbench.verbs import ends_by_code

Json = dict[str, Any]
_OWN = ("--request-rate", "--concurrency", "--batch", "--time-scale", "--output", "--seed", "--recover")
_EPILOG = f"""Everything after -- goes to `pdbench run`, limits included (--slo-ttft-ms, --slo-tpot-ms, --slo-e2e-ms):

  pdbench search goodput --start 2 --output DIR -- --url http://127.0.0.1:8000 --model NAME --isl 512 --osl 128 \\
      --num-requests 300 --slo-ttft-ms 500 --slo-tpot-ms 30

Whether a backlog grows takes {LEAST_SENT} requests to tell, so --num-requests is at least that; more decide more.
The same command again goes on where it was stopped. Result, or what is known of it so far: DIR/goodput.json.
exit codes: 0 found, 3 a run cannot be believed, 2 bad usage, 1 could not measure."""


class Stop(Exception):
    """The search cannot go on: exit code, and what to tell the user."""

    def __init__(self, code: int, message: str) -> None:
        """Take both."""
        super().__init__(message)
        self.code = code


@ends_by_code
def main(argv: list[str]) -> int:
    """Run the verb and return its exit code."""
    cut = argv.index("--") if "--" in argv else len(argv)
    args = _parser().parse_args(argv[:cut])
    options = argv[cut + 1 :]
    try:
        _check(args, options)
        runs = Runs(args.output, options)
        if args.dry_run:
            print(f"first:  {shlex.join(runs.command(args.start, 0))}")
            print(f"then:   rates doubled or halved from {args.start:g}/s, each in up to {args.repeats} runs")
            return 0
        runs.begin()
        return _finish(args, _searched(args, runs))
    except Stop as why:
        print(f"pdbench search: {why}", file=sys.stderr)
        return why.code
    except OSError as why:
        print(f"pdbench search: cannot write in {args.output}: {why.strerror or why}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pdbench search: stopped; the same command goes on from here", file=sys.stderr)
        return 1


def _searched(args: argparse.Namespace, runs: Runs) -> Outcome:
    """Search and write what was found, also when the search is stopped; say it after the steps."""
    found = Outcome()

    def told(step: Step) -> None:
        found.steps.append(step)
        _tell(step, args.share)
        # A bound by the client is one only where something is known below it.
        if step.counts.unjudged.startswith(SLOW_CLIENT) and found.rate is None:
            raise Stop(3, f"at {step.rate:g}/s the run cannot be believed: {step.counts.unjudged}; take a lower --start")

    try:
        search(runs.measure, args.start, args.share, args.tolerance, args.repeats, args.highest, told)
    except (Stop, KeyboardInterrupt):
        if found.steps:
            _write(args, runs, found, complete=False)
            print(f"so far: {_bracket(found, runs, args.share)}")
        raise
    _write(args, runs, found, complete=True)
    if found.rate is not None:
        print(f"goodput: {_bracket(found, runs, args.share)}")
    if runs.no_gpu:
        print(f"{runs.no_gpu}: this says nothing about hardware")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdbench search",
        description="Find the highest rate at which requests still meet their limits.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["goodput"])
    parser.add_argument("--start", type=float, default=1.0, metavar="R", help="first rate, requests/s (1)")
    parser.add_argument("--highest", type=float, default=float("inf"), metavar="R", help="no rate above this is tried")
    parser.add_argument("--share", type=float, default=0.9, metavar="S", help="of requests that must meet every limit (0.9)")
    parser.add_argument("--tolerance", type=float, default=0.05, metavar="T", help="width of the answer, as a share of it (0.05)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of a rate, at most, to decide it (3)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where runs and result go")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and run nothing")
    return parser


def _check(args: argparse.Namespace, options: Sequence[str]) -> None:
    for name, low, high in (("start", 0, 1e6), ("highest", 0, float("inf")), ("share", 0, 1), ("tolerance", 0, 1)):
        value = getattr(args, name)
        if not low < value <= high or (name in ("share", "tolerance") and value == 1):
            raise Stop(2, f"--{name} {value:g}: write a number above {low}" + (" and below 1" if high == 1 else ""))
    if args.repeats < 1:
        raise Stop(2, f"--repeats {args.repeats}: write a whole number from 1 up")
    given = [option.partition("=")[0] for option in options]
    taken = [name for name in _OWN if name in given]
    if taken:
        raise Stop(2, f"{', '.join(taken)}: the search sets this itself; leave it out after --")
    count = _value(options, "--num-requests")
    if count.isdecimal() and int(count) < LEAST_SENT:
        raise Stop(2, f"--num-requests {count}: whether a backlog grows cannot be told with fewer than {LEAST_SENT}")
    if not any(option.startswith("--slo-") for option in given):
        raise Stop(2, "no limit is set: write --slo-ttft-ms, --slo-tpot-ms or --slo-e2e-ms after --")


class Runs:
    """The runs of one search, a folder each; what stands there already is not measured again."""

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        """Take where to write, and what every run is told; nothing is written yet."""
        self._folder = folder
        self._options = list(options)
        self.gpus: int | None = None
        self.no_gpu = _no_gpu(self._options)

    def command(self, rate: float, number: int) -> list[str]:
        """Return the command line of a run; its seed differs from every other run's, so that no cache knows its prompts."""
        own = ["--request-rate", f"{rate:g}", "--seed", str(_seed(rate, number)), "--output", str(self._place(rate, number))]
        return [sys.executable, "-m", "pdbench", "run", *self._options, *own]

    def begin(self) -> None:
        """Make the folder; raise Stop when it belongs to another search."""
        asked = {"schema": 1, "options": self._options}
        path = self._folder / "search.json"
        if path.exists():
            try:
                same = json_of(path.read_text(encoding="utf-8")) == asked
            except ValueError:
                same = False
            if not same:
                raise Stop(2, f"{self._folder} holds a search with other options for `pdbench run`; choose another --output")
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(path, asked)

    def measure(self, rate: float, number: int) -> Counts:
        """Run once, or read what a former search measured; raise Stop when that cannot be believed."""
        place = self._place(rate, number)
        summary = place / "summary.json"
        if not _kept(summary):
            if place.exists():  # the run was broken off, stopped, or not to be believed
                place.rename(self._unused(place))
            code = subprocess.run(self.command(rate, number), check=False).returncode
            if code not in (0, 3):
                raise Stop(code if code in (1, 2) else 1, f"`pdbench run` at {rate:g}/s ended with exit code {code}")
        found: Json = json_of(summary.read_text(encoding="utf-8"))
        faults = _faults(found)
        other = [why for why in faults if not why.startswith(SLOW_CLIENT)]
        if other:
            raise Stop(3, f"at {rate:g}/s the run cannot be believed: {other[0]} ({summary})")
        if not found.get("goodput"):
            raise Stop(3, f"{summary} has no goodput: it was measured without limits")
        self.gpus = found.get("gpus")
        goodput, saturation = found["goodput"], found.get("saturation") or {}
        unjudged = faults[0] if faults else _unjudged(saturation)
        grew = saturation.get("oversaturated") is True
        return Counts(goodput["good"], goodput["sent"], grew, goodput.get("independent"), unjudged)

    def _place(self, rate: float, number: int) -> Path:
        return self._folder / f"rate-{rate:g}-{number}"

    def _unused(self, place: Path) -> Path:
        names = (place.with_name(f"{place.name}.broken-{n}") for n in range(1, 1000))
        return next(name for name in names if not name.exists())


def _kept(summary: Path) -> bool:
    """Tell whether a former start has measured what this summary says."""
    try:
        return not _faults(json_of(summary.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _faults(found: Json) -> list[str]:
    # A request that fails is one that misses its limits; anything else is no answer to what was asked.
    return [why for why in found["invalid_reasons"] if not (found["failed"] and "requests failed" in why)]


def _unjudged(saturation: Json) -> str:
    """Return why a run does not show that the servers keep up with its rate, "" when it does."""
    known = saturation.get("oversaturated") is not None
    if saturation.get("oversaturated") or saturation.get("kept_up", known):
        return ""
    if known:
        return "answers ended more slowly than requests were sent; more requests tell whether the backlog grows"
    return f"whether the backlog grows is not known: {saturation.get('reason', 'it was not looked at')}"


def _seed(rate: float, number: int) -> int:
    return zlib.crc32(f"{rate:g} {number}".encode())


def _value(options: Sequence[str], name: str) -> str:
    """Return what an option of `pdbench run` was given last, "" without it."""
    given = [value for option, value in pairwise((*options, "")) if option == name]
    joined = [option.partition("=")[2] for option in options if option.startswith(f"{name}=")]
    return (joined + given or [""])[-1]


def _no_gpu(options: Sequence[str]) -> str:
    """Return why the figures say nothing about hardware, as far as the plan tells; "" when they may."""
    try:
        plan = json_of(Path(_value(options, "--plan")).read_text(encoding="utf-8"))
        return no_gpu(bool(plan.get("emulated")), bool(plan.get("on_cpu")))
    except (OSError, ValueError, AttributeError):
        return ""  # `pdbench run` says what is wrong with it


def _tell(step: Step, share: float) -> None:
    low, high = step.interval
    verdict = "meets" if step.met else "misses"
    why = "; the backlog grew" if step.counts.oversaturated else "; close" if step.close else ""
    if unjudged := _unknown(step, share):
        verdict, why = "cannot be judged by", f"; {unjudged}"
    got = step.counts.good / max(1, step.counts.sent)
    found = f"{got:.1%} [{low:.1%}, {high:.1%}] of {step.counts.sent} requests"
    print(f"{step.rate:g}/s {verdict} {share:.0%}: {found}{why}", flush=True)


def _unknown(step: Step, share: float) -> str:
    """Return why a step could not be judged, "" where it was: of a share that is missed nothing else need be known."""
    why = step.counts.unjudged
    return why if why.startswith(SLOW_CLIENT) or step.interval[1] >= share else ""


def _finish(args: argparse.Namespace, found: Outcome) -> int:
    if found.rate is None:
        why = _unknown(min(found.steps, key=lambda step: step.rate), args.share) or "limits out of reach"
        raise Stop(1, f"no rate from {args.start:g}/s down to {found.above:g}/s meets {args.share:.0%}: {why}")
    return 0


def _bracket(found: Outcome, runs: Runs, share: float) -> str:
    """Return the highest rate that was met and what bounds it, in words."""
    end = min((step for step in found.steps if not step.met), key=lambda step: step.rate, default=None)
    bound = "nothing higher was tried"
    if end:
        why = _unknown(end, share)
        bound = f"{end.rate:g}/s cannot be judged: {why}" if why else f"missed at {end.rate:g}/s"
    if found.rate is None:
        return f"no rate was met, {bound}"
    per_gpu = f", {found.rate / runs.gpus:.3g}/s per GPU ({runs.gpus} GPUs)" if runs.gpus else ""
    return f"{found.rate:g} requests/s{per_gpu}, {bound}"


def _write(args: argparse.Namespace, runs: Runs, found: Outcome, complete: bool) -> None:
    rate = found.rate
    result = {
        "schema": 1,
        "complete": complete,
        "share": args.share,
        "goodput": rate,
        "goodput_per_gpu": rate / runs.gpus if rate is not None and runs.gpus else None,
        "missed_at": found.above,
        "gpus": runs.gpus,
        "no_gpu": runs.no_gpu,
        "steps": [{**asdict(step), "interval": list(step.interval)} for step in found.steps],
    }
    write_json(args.output / "goodput.json", result)
