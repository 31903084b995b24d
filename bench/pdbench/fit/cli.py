"""`pdbench fit`: a profile for the emulator and the advisor from measured runs, with its error on runs that were kept out."""

from __future__ import annotations

import argparse
import fnmatch
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from statistics import mean

import yaml

from pdbench.fit.cases import FIGURES, Case, read, read_table, simulate, transport_of
from pdbench.fit.solve import Fit, Simulate, fit, values_of
from pdbench.load.errors import LoadError
from pdbench.model.profile import Profile, ProfileError, load

_EPILOG = """RUN is a run's folder (results/<id>), or a sweep's (results/sweeps/<name>), whose valid runs are all taken, or a
sweep's results.csv, whose requests are then taken to be all as long as their mean.

  pdbench fit results/sweeps/h200x2-qwen --base h200-qwen2.5-3b --hold-out '2agg*' --output h200.yml

What is fitted: the engine's efficiencies and overheads, its front end, and the transfer's latency. Model, GPU and limits stay as
the base profile has them. Figures that the runs say nothing of stay near the base's, and are marked so.

exit codes: 0 written, 1 the runs cannot be read, 2 bad usage"""


def main(argv: list[str]) -> int:
    """Run the verb and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        base = load(args.base)
        cases = [case for path in args.runs for case in load_points(path)]
        transport_of(cases)
        out = [case for case in cases if args.hold_out and fnmatch.fnmatch(case.name, args.hold_out)]
        used = [case for case in cases if case not in out]
        if args.hold_out and not out:
            raise LoadError(f"--hold-out {args.hold_out!r} matches none of: {', '.join(case.name for case in cases)}")
        if not used:
            raise LoadError(f"--hold-out {args.hold_out!r} leaves nothing to fit to")
    except ProfileError as why:
        return _say(why, 2)
    except LoadError as why:
        return _say(why, 1)
    with simulator() as simulated:
        found = fit(base, used, simulated, lambda text: print(f"pdbench fit: {text}", file=sys.stderr, flush=True))
        print(table(base, found, used))
        print("\nmodel beside what was measured:\n" + errors(found.profile, used, out, simulated))
    if any(case.emulated for case in cases):
        print("\nEMULATED: these runs used no GPU; the profile is fitted to a model's own figures.")
    text = written(base, found, used, args.runs)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
        print(f"\nprofile: {args.output}    (pdbench emulate --profile {args.output}, or emulated_profile in an inventory)")
    else:
        print("\n" + text)
    return 0


def load_points(path: Path) -> list[Case]:
    """Return the load points of a run's folder, of a sweep's valid runs, or of a table; raise LoadError when there are none."""
    if path.suffix == ".csv":
        return read_table(path)
    return [case for run in runs(path) for case in read(run)]


def runs(folder: Path) -> list[Path]:
    """Return the runs of a folder: itself, or the valid ones of a sweep; raise LoadError when there are none."""
    if (folder / "summary.json").exists():
        return [folder]
    found = sorted(path.parent for path in folder.glob("runs/*/*/validity.json") if '"valid": true' in path.read_text())
    if not found:
        raise LoadError(f"{folder} is neither a run's folder (summary.json) nor that of a sweep with valid runs")
    return found


@contextmanager
def simulator() -> Iterator[Simulate]:
    """Simulate on all cores."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:

        def simulated(asked: Sequence[tuple[Profile, Case]]) -> Sequence[Mapping[str, float]]:
            return list(pool.map(simulate, *zip(*asked, strict=True), chunksize=1)) if asked else []

        yield simulated


def table(base: Profile, found: Fit, used: Sequence[Case]) -> str:
    """Return every fitted figure: before, after, and how well the runs determine it."""
    before = values_of(base, transport_of(used))
    lines = [f"{'figure':<26}{'before':>10}{'fitted':>10}  {'+-':>7}"]
    for name, value in found.values.items():
        error = found.errors.get(name)
        doubt = "not fitted (0)" if error is None else f"{100 * math.expm1(error):6.1f}%"
        note = "" if found.known.get(name) else "   these runs hardly say"
        lines.append(f"{name:<26}{before[name]:>10.4g}{value:>10.4g}  {doubt:>7}{note}")
    return "\n".join(lines)


def errors(profile: Profile, used: Sequence[Case], out: Sequence[Case], simulated: Simulate) -> str:
    """Return a table of measured and modelled figures, and the mean errors of runs that were used and of those kept out."""
    told = simulated([(profile, case) for case in [*used, *out]])
    heads = {"output_throughput": "tok/s", "ttft_ms": "TTFT ms", "itl_ms": "ITL ms", "e2e_ms": "E2E ms"}
    lines = [f"{'':<28}" + "".join(f"{head:>24}" for head in heads.values())]
    off: dict[bool, dict[str, list[float]]] = {False: {}, True: {}}
    for number, (case, model) in enumerate(zip([*used, *out], told, strict=True)):
        kept_out = number >= len(used)
        cells = []
        for name in FIGURES:
            measured = case.measured[name]
            error = model[name] / measured - 1 if measured else 0.0
            off[kept_out].setdefault(name, []).append(abs(error))
            cells.append(f"{measured:9.4g} {model[name]:8.4g} {error:+5.0%}".rjust(24))
        lines.append(f"{('* ' if kept_out else '') + case.name:<28}" + "".join(cells))
    for kept_out, label in ((False, "mean error, fitted"), (True, "* mean error, kept out")):
        if off[kept_out]:
            lines.append(f"{label:<28}" + "".join(f"{mean(values):.1%}".rjust(24) for values in off[kept_out].values()))
    return "\n".join(lines)


def written(base: Profile, found: Fit, used: Sequence[Case], folders: Sequence[Path]) -> str:
    """Return the fitted profile as YAML, every figure with where it comes from."""
    what = f"{len(used)} load points of {', '.join(folder.name for folder in folders)}"
    profile, transport = found.profile, transport_of(used)

    def source(name: str, key: str) -> str:
        if key not in found.errors:
            return base.sources[name]
        if found.known[key]:
            emulated = "of an emulated engine " if used[0].emulated else ""
            return f"measured: fitted to {what} {emulated}by pdbench fit, +-{100 * math.expm1(found.errors[key]):.0f} %"
        return f"derived: fitted with others to {what}, which hardly say what it is"

    def rows(part: object, prefix: str) -> dict[str, list[object]]:
        told = {}
        for field in fields(part):  # type: ignore[arg-type]
            name = f"{prefix}{field.name}"
            if name in base.sources:
                key = field.name if prefix in ("engine.", f"transports.{transport}.") else ""
                value = getattr(part, field.name)
                told[field.name] = [float(f"{value:.4g}") if key in found.errors else value, source(name, key)]
        return told

    data = {
        "description": f"{base.description.partition(':')[0]}: fitted to {what}",
        "model": rows(profile.model, "model."),
        "gpu": rows(profile.gpu, "gpu."),
        "engine": rows(profile.engine, "engine."),
        "transports": {way: rows(part, f"transports.{way}.") for way, part in profile.transports.items()},
    }
    return yaml.safe_dump(data, sort_keys=False, width=200, default_flow_style=None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdbench fit",
        description="Fit the performance model's figures to measured runs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run or of a sweep")
    parser.add_argument("--base", required=True, metavar="PROFILE", help="profile to start from: a shipped one's name, or a file")
    parser.add_argument("--hold-out", metavar="GLOB", help="load points to keep out and test with, such as '2agg*' or '*c=128'")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the profile here (default: print it)")
    return parser


def _say(what: object, code: int) -> int:
    print(f"pdbench fit: {what}", file=sys.stderr)
    return code
