"""`pdbench advise`: which ratio, predicted; `--check`: how wrong predictions were."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pdbench.advise import say
from pdbench.advise.pool import pool
from pdbench.load.errors import LoadError
from pdbench.load.requests import Load
from pdbench.metrics import Slo
from pdbench.model.profile import Profile, ProfileError, load, shipped
from pdbench.reading import json_of
from pdbench.records import write_json
from pdbench.run import load_options
from pdbench.run.load_options import above_zero, at_least, with_load_file
from pdbench.run.load_points import build
from pdbench.sweep.checkout import ROOT, has_plays
from pdbench.sweep.cli import DEFAULT_INVENTORY

Json = dict[str, Any]
#: requests of a load that does not say how many
_REQUESTS = 2000
_EPILOG = f"""{load_options.HELP}

Without a load, that of the inventory's bench_* variables. --warmup, --prompt, --token-ids and --tokenizer are taken so that
one load file serves here and for `pdbench run`; they change no prediction. Every figure is a prediction: `pdbench sweep`
measures, and --check says how far off predictions are. docs/advise.md.
exit codes: 0 done, 2 bad usage, 1 could not, 3 (--verify) not all runs are valid."""


def main(argv: list[str]) -> int:
    """Run the verb and return its exit code."""
    parser = _parser()
    if not has_plays():
        print(f"pdbench advise reads a checkout's inventories, and {ROOT} is none: run .venv/bin/pdbench there", file=sys.stderr)
        return 1
    errors = importlib.import_module("pdlib.errors")
    runs = importlib.import_module("pdbench.gate.rundata")
    try:
        args = with_load_file(parser, argv)
        at_least(args, 1, "seeds", "processes")
        above_zero(args, "slo_ttft_ms", "slo_tpot_ms", "slo_e2e_ms")
        limits = any(getattr(args, f"slo_{name}_ms") is not None for name in ("ttft", "tpot", "e2e"))
        if args.verify and (args.check or args.output is None or limits or _says_load(args)):
            raise LoadError(
                "--verify measures the load of the bench_* variables and keeps it in --output DIR: leave --check out, and give "
                "load and limits as for bench.yml, such as -e bench_concurrency=32 -e bench_slo_ttft_ms=500"
            )
        if args.leave_one_out and not args.check:
            raise LoadError("--leave-one-out goes with --check PATH")
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
        return _check(args) if args.check else _advise(parser, args)
    except (LoadError, ProfileError, errors.UserError) as why:
        return _say(why, 2)
    except (runs.NotARun, ValueError) as why:
        return _say(why, 1)
    except OSError as why:
        return _say(f"cannot write in {args.output}: {why.strerror or why}" if args.output else why, 1)
    except KeyboardInterrupt:
        return _say("stopped", 1)


def _say(what: object, code: int) -> int:
    print(f"pdbench advise: {what}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    p = load_options.Parser(
        prog="pdbench advise",
        description="Simulate every ratio that an inventory allows and say which to take, and why. Nothing is deployed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = p.add_argument_group("what is simulated")
    where.add_argument("-i", "--inventory", default=DEFAULT_INVENTORY, help="default: %(default)s")
    where.add_argument("-l", "--limit", metavar="PATTERN", help="only these hosts, as for ansible-playbook")
    where.add_argument(
        "-e", "--extra", action="append", default=[], metavar="NAME=VALUE", help="a variable, as for ansible-playbook"
    )
    where.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="[HOST=]P",
        help=f"figures of the GPUs: a file, or {', '.join(shipped())}",
    )
    where.add_argument("--ratios", metavar="R[,R]", help="default: all that use the inventory's GPUs as far as they go")
    where.add_argument("--seeds", type=int, metavar="N", help="simulations of each ratio, for the intervals (default: 6)")
    where.add_argument("--processes", type=int, metavar="N", help="default: as many as there are cores")
    load_options.add_arguments(p)
    judge = p.add_argument_group("judgement")
    for name, what in (("ttft", "time to first token"), ("tpot", "time per output token"), ("e2e", "whole request")):
        judge.add_argument(f"--slo-{name}-ms", type=float, metavar="MS", help=f"rank by goodput: limit for the {what}")
    judge.add_argument("--check", metavar="PATH", help="a sweep or runs, as for `pdbench compare`: predicted beside measured")
    judge.add_argument(
        "--leave-one-out", action="store_true", help="with --check: predict each ratio with figures fitted to all the others"
    )
    judge.add_argument("--verify", action="store_true", help="deploy and measure the best two, and say which won")
    p.add_argument("--output", type=Path, metavar="DIR", help="folder for advice.json and advice.png (with --check: check.json)")
    return p


def extra(given: Sequence[str]) -> Json:
    """Return -e options as variables; raise UserError for what is none."""
    errors = importlib.import_module("pdlib.errors")
    settings = importlib.import_module("pdlib.settings")
    found: Json = {}
    for text in given:
        try:
            if text.startswith("@"):
                found.update(dict(importlib.import_module("yaml").safe_load(Path(text[1:]).read_text(encoding="utf-8"))))
                continue
            if text.startswith("{"):
                found.update(json_of(text))
                continue
        except (OSError, ValueError, TypeError) as why:
            raise errors.UserError(f"-e {text}: {why}") from None
        name, equals, value = text.partition("=")
        if not equals:
            raise errors.UserError(f"-e {text!r}: write NAME=VALUE, a JSON mapping, or @FILE")
        found[name] = value
    settings.check_extra_vars(found)
    return found


def _advise(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    rank = importlib.import_module("pdbench.advise.rank")
    where = importlib.import_module("pdbench.advise.where")
    simulate = importlib.import_module("pdbench.advise.simulate")
    given = extra(args.extra)
    wanted = [one.strip() for one in args.ratios.split(",") if one.strip()] if args.ratios else []
    found = where.candidates(args.inventory, args.limit, given, wanted, args.profile)
    loads, slo = _loads(parser, args, found.settings, where)
    print("a prediction by simulation; nothing was measured. It rests on:")
    for one in found.profiles.values():
        print(f"  {say.grounds(one)}")
    for note in found.notes:
        print(f"note: {note}")
    seeds = args.seeds or rank.SEEDS
    points, orders = [], []
    for number, one_load in enumerate(loads, 1):
        works = [simulate.work(one_load, slo, seed) for seed in range(seeds)]
        goal = rank.goal_of(works[0])
        with pool((found.layouts, found.profiles, works), args.processes) as spread:
            order = rank.advise(found.layouts, seeds, goal, spread)
        _tell(order, goal, one_load)
        orders.append(order)
        words = {"words": say.load_words(one_load), "concurrency": one_load.concurrency, "request_rate": one_load.rate}
        points.append(say.to_json(order, goal, words, found.profiles, slo))
        if args.output is not None and any(each.rank for each in order):
            picture = importlib.import_module("pdbench.advise.draw").picture
            name = "advice.png" if len(loads) == 1 else f"advice-{number}.png"
            (args.output / name).write_bytes(picture(order, goal, say.load_words(one_load)))
    if args.output is not None:
        write_json(args.output / "advice.json", {"schema": 1, "points": points})
        print(f"\n{args.output}: advice.json, {'advice.png' if len(loads) == 1 else 'a picture a load point'}")
    if not args.verify:
        return 0
    auto = importlib.import_module("pdbench.advise.auto")
    where_to = ["-i", args.inventory, *(["-l", args.limit] if args.limit else [])]
    two = auto.best_two(orders, goal)
    told = (found.of_host.__getitem__, found.profiles, args.processes, goal.removesuffix("_per_gpu"))
    code: int = auto.verify(two, given, where_to, args.output, *told)
    return code


def _says_load(args: argparse.Namespace) -> bool:
    """Tell whether the command line says what is sent."""
    return any(
        getattr(args, name, None) is not None for name in ("load", *load_options.PACES, "time_scale", "trace", "isl", "osl")
    )


def _loads(parser: argparse.ArgumentParser, args: argparse.Namespace, settings: Json, where: Any) -> tuple[list[Load], Slo]:
    """Return the load points and limits: of the command line, else of the inventory."""
    if not _says_load(args):
        with tempfile.TemporaryDirectory() as scratch:
            said = with_load_file(parser, where.load_arguments(settings, Path(scratch)))
        limits = any(getattr(args, f"slo_{name}_ms") is not None for name in ("ttft", "tpot", "e2e"))
        for name in () if limits else ("slo_ttft_ms", "slo_tpot_ms", "slo_e2e_ms"):
            setattr(args, name, getattr(said, name))
        said.seed = args.seed or said.seed
        if args.num_requests is not None:
            said.num_requests, said.duration = args.num_requests, None
    else:
        said = args
        if args.trace is None and args.num_requests is None and args.duration is None and args.batch is None:
            said.num_requests = _REQUESTS
    for name in ("share_prefixes", "dataset", "conversation", "prefix_len"):
        if getattr(said, name, None):
            raise LoadError(f"{load_options.option(name)}: what prefix caches save is not simulated; leave it out")
    return build(said, "generate", True).loads, Slo(args.slo_ttft_ms, args.slo_tpot_ms, args.slo_e2e_ms)


def _tell(order: Sequence[Any], goal: str, one_load: Load) -> None:
    print(
        f"\n{say.load_words(one_load)}; {len(order[0].runs)} seeds, ± is a 95 % interval over them\n\n{say.table(order, goal)}\n"
    )
    for each in [each for each in order if each.gains][:2]:
        print(f"{each.layout.ratio}, stage by stage:\n{say.evidence(each)}")
    print(f"\n{say.verdict(order, goal)}", flush=True)


def _check(args: argparse.Namespace) -> int:
    check = importlib.import_module("pdbench.advise.check")
    of_host: dict[str, str] = {}
    rest = ""
    for text in args.profile:
        host, equals, name = text.partition("=")
        if equals:
            of_host[host] = name
        else:
            rest = text
    if not rest and not of_host:
        raise LoadError(f"--check needs --profile: a file, or one of {', '.join(shipped())}")
    profiles: dict[str, Profile] = {name: load(name) for name in {*of_host.values(), *([rest] if rest else [])}}

    def profile_of(host: str) -> str:
        name = of_host.get(host, rest)
        if not name:
            raise LoadError(f"--profile {host}=P is missing: the runs have a worker there")
        return name

    rows, notes = check.read(args.check)
    begin = partial(pool, processes=args.processes)
    if args.leave_one_out:
        if of_host:
            raise LoadError("--leave-one-out fits one profile for all hosts: give --profile P without HOST=")
        found = check.leave_one_out(rows, importlib.import_module("pdbench.advise.fitted").fitter(load(rest)), begin)
        notes.append("each ratio was predicted with this profile, fitted to the runs of all the other ratios")
    else:
        found = check.predicted(rows, profile_of, profiles, begin)
    who = check.winners(rows, found, check.goal(found))
    for one in profiles.values():
        print(say.grounds(one))
    for note in notes:
        print(f"note: {note}")
    print(f"\n{check.words(found, who)}")
    if args.output is not None:
        write_json(args.output / "check.json", check.to_json(found, who, notes))
    return 0
