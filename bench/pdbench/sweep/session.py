"""One session of a sweep: from the command line to the table, in a folder that another session can go on with."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pdbench import shapes
from pdbench.sweep import grid, journal, order, planning, plays, rehearsal, spec, table
from pdbench.sweep.checkout import ROOT
from pdbench.sweep.cli import DEFAULT_INVENTORY, INTERRUPTED, INVALID, VALID
from pdbench.sweep.drive import Sweep
from pdbench.sweep.estimate import Remaining
from pdbench.sweep.progress import Progress
from pdlib.errors import UserError, listing

Json = dict[str, Any]


def run(args: argparse.Namespace) -> int:
    """Plan, print the order, measure; return the exit code. Raise UserError for what cannot be."""
    read = spec.read(args.spec)
    if args.rehearse:
        read = replace(read, name=f"{read.name}-rehearsal", repeats=1)
    folder = args.output or ROOT / "results" / "sweeps" / read.name
    before = journal.load(folder)
    if args.resume:
        _check_same(folder, before, read, args)
    elif before is not None and not args.dry_run:
        raise UserError(f"{folder} holds a sweep already: --resume goes on with it, --output begins another one elsewhere")
    cells = _cells(before, args) if args.resume and before else grid.cells(read, args.inventory or DEFAULT_INVENTORY)

    def resolve(where: str, deployments: Sequence[Json]) -> Json:
        return plays.resolve(where, deployments, args.limit)

    if args.rehearse and not args.resume:
        planned = rehearsal.plan(cells, read.baseline, resolve, ROOT / ".pd" / "rehearsal")
    else:
        planned = planning.make(cells, read.baseline and not args.resume, resolve)
    keys = list(planned.plans)
    numbers = [keys.index(cell.deployment) for cell in planned.cells]
    made, plain = order.arrange(numbers, read.repeats, lambda n, running: planned.replan(keys[n], running))
    runs = len(planned.cells) * read.repeats
    print(f"{read.name}: {len(planned.cells)} cells x {read.repeats} = {runs} runs on {len(set(numbers))} deployments\n")
    if args.resume and before:
        wanted = [(name, repeat) for name, repeat in before["order"]]
        places = {cell.id: place for place, cell in enumerate(planned.cells)}
        left = [one for one in wanted if one not in journal.Journal(folder).measured()]
        made = order.follow(
            [(places[name], repeat) for name, repeat in left], numbers, lambda n, running: planned.replan(keys[n], running)
        )
        print(f"{runs - len(left)} of {runs} are measured; what is left:\n")
    else:
        wanted = [(planned.cells[place].id, repeat) for place, repeat in made.order]
    print(table.order(planned, made, None if args.resume else plain), flush=True)
    if args.dry_run:
        return VALID
    folder.mkdir(parents=True, exist_ok=True)
    with journal.locked(folder):
        if not args.resume:
            _begin(folder, read, planned, wanted, args)
        return _measure(folder, read, planned, made, wanted, args)


def _cells(before: Json, args: argparse.Namespace) -> list[grid.Cell]:
    """Return the cells as they were when the sweep began; its inventory may lie elsewhere on this machine."""
    found = [grid.Cell(**cell) for cell in before["cells"]]
    if args.inventory is None:
        return found
    return [replace(cell, inventory=args.inventory) if cell.inventory == before["inventory"] else cell for cell in found]


def _check_same(folder: Path, before: Json | None, read: spec.Spec, args: argparse.Namespace) -> None:
    if before is None:
        raise UserError(f"{folder} holds no sweep to resume: leave --resume out, or name its folder with --output")
    if why := shapes.newer(before):
        raise UserError(f"{folder}/sweep.json: {why}")
    changed = journal.difference(before["spec"], read.raw)
    if changed:
        raise UserError(f"{args.spec} is not what {folder} was begun with: {changed}. Put it back, or begin anew with --output")
    if before.get("rehearsal", False) != args.rehearse:
        raise UserError(
            f"{folder} holds {'no' if args.rehearse else 'a'} rehearsal: {'leave out' if args.rehearse else 'give'} --rehearse"
        )
    if before.get("limit") != args.limit:
        was = f"-l {before['limit']}" if before.get("limit") else "no -l"
        raise UserError(f"{folder} was begun with {was}: its cells would be placed elsewhere; give the same")


def _begin(
    folder: Path, read: spec.Spec, planned: planning.Planned, wanted: list[tuple[str, int]], args: argparse.Namespace
) -> None:
    inside = [path.name for path in folder.iterdir() if path.name != journal.LOCK]
    if inside:
        raise UserError(f"{folder} is not empty ({listing(sorted(inside)[:3])}): name another folder with --output")
    journal.save(folder, {
        "schema": 1, "name": read.name, "spec_file": str(args.spec), "spec": read.raw,
        "inventory": args.inventory or DEFAULT_INVENTORY,
        "limit": args.limit, "created": datetime.now(UTC).isoformat(timespec="seconds"), "repeats": read.repeats,
        "cells": [cell.to_json() for cell in planned.cells], "order": [list(one) for one in wanted],
        **({"rehearsal": True} if args.rehearse else {}),
    })  # fmt: skip


def _measure(
    folder: Path,
    read: spec.Spec,
    planned: planning.Planned,
    made: order.Arrangement,
    wanted: list[tuple[str, int]],
    args: argparse.Namespace,
) -> int:
    kept = journal.Journal(folder)
    last = next((one for one in reversed(kept.events) if one["event"] == "session"), None)
    ended = plays.end_orphans(folder / plays.SCRATCH)
    kept.write("session", host=socket.gethostname(), pid=os.getpid(), resumed=args.resume, ended_plays=len(ended))
    if ended:
        print(f"\n{len(ended)} processes of plays that outlived the sweep before were ended")
    took = table.seconds(made, planned)
    ids = [(planned.cells[place].id, repeat) for place, repeat in made.order]
    remaining = Remaining(
        {name: load for (name, _), (_, load) in zip(ids, took, strict=True)},
        {one: deploy for one, (deploy, _) in zip(ids, took, strict=True)},
    )
    view = Progress(ids, len(wanted), remaining)
    driver = plays.Plays(
        folder, args.limit, grid.loads(planned.cells), view.tick,
        fetched=frozenset(key for key, one in planned.clusters.items() if one.cluster["model_source"] in ("hub", "rsync")),
        steal=last is not None and last["host"] != socket.gethostname(),
        begun=[cell.inventory for cell in planned.cells if any(kept.attempts(cell.id, n + 1) for n in range(read.repeats))],
    )  # fmt: skip
    driver.collect_interrupted()
    print(flush=True)
    try:
        with plays.interruptible():
            Sweep(folder, planned.cells, wanted, kept, driver, view).run(read.retries, read.fetch_ahead)
    except KeyboardInterrupt:
        kept.write("interrupted")
        print(
            f"\ninterrupted; the running cell is lost, the others are kept. Go on with:\n  {_again(args)}",
            file=sys.stderr,
        )
        return INTERRUPTED
    finally:
        driver.close()
        if args.rehearse:
            _take_down(driver, folder)
    text, good = table.results(folder, planned.cells, read.repeats, kept)
    print(f"\n{text}\n")
    _finish(folder)
    if not good:
        print(
            f"some cells have no valid run (journal.jsonl says why); to try them again:\n  {_again(args)}",
            file=sys.stderr,
        )
    return VALID if good else INVALID


def _take_down(driver: plays.Plays, folder: Path) -> None:
    """End the workers of a rehearsal: nobody asked for them by name, so nobody would look for them."""
    print("\ntaking the emulated workers down", flush=True)
    try:
        with plays.interruptible():
            ended = driver.take_down(folder / "teardown.log")
            why = ended.why
    except KeyboardInterrupt:
        why = "interrupted"
    if why:
        print(f"emulated workers may still run on this machine ({why}); {folder / 'teardown.log'}", file=sys.stderr)


def _again(args: argparse.Namespace) -> str:
    words = ["pdbench sweep", str(args.spec)]
    words += ["-i", args.inventory] if args.inventory else []
    words += ["-l", args.limit] if args.limit else []
    words += ["--output", str(args.output)] if args.output else []
    words += ["--rehearse"] if args.rehearse else []
    return " ".join([*words, "--resume"])


def _finish(folder: Path) -> None:
    """Make the tidy table and the report; what was measured stands whatever becomes of them."""
    for module, what in (("pdbench.sweep.tidy", "results.parquet, results.csv"), ("pdbench.sweep.report", "report.html")):
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(module) is None:
                continue
        try:
            importlib.import_module(module).write(folder)
        except Exception as error:
            print(f"{what} could not be made ({type(error).__name__}: {error}): pdbench report {folder}", file=sys.stderr)
        else:
            print(f"{folder}: {what}")
