"""One session: a play that watches, a play that changes the ratio, in turns; a log of both, a table and a picture at the end."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pdbench.autoscale import draw
from pdbench.reading import json_of
from pdbench.sweep import plays
from pdbench.sweep.checkout import ROOT
from pdlib import autoscale
from pdlib.errors import UserError
from pdlib.tables import duration, table

Json = dict[str, Any]
LOG, PICTURE = "autoscale.jsonl", "autoscale.png"
#: a change that failed is typed again, which completes it; after so many failures in a row a human is needed
FAILURES = 2
_LINE_S = 10.0


class Session:
    """What turns share: where the log is, and the rule with the rest that the last change asks for."""

    def __init__(self, args: argparse.Namespace, rule: autoscale.Rule, folder: Path) -> None:
        """Begin a log in ``folder``."""
        self.args, self.rule, self.folder = args, rule, folder
        self.inventory = plays.inventory_path(args.inventory)
        self.log = folder / LOG
        self.until = time.time() + args.seconds if args.seconds else None
        self.rest_until: float | None = None
        self.shown = 0
        begin = {"at": round(time.time(), 1), "kind": "begin", "schema": 1, "rule": asdict(rule), "every_s": args.every}
        self._note({**begin, "dry_run": args.dry_run})

    def watch(self) -> str:
        """Return the ratio to change to, "" once the time is over; raise UserError when nothing can be watched."""
        job = self.folder / "job.json"
        job.write_text(
            json.dumps(
                {
                    "rule": asdict(self.rule), "every_s": self.args.every, "until": self.until, "rest_until": self.rest_until,
                    "dry_run": self.args.dry_run, "pid": os.getpid(), "log": str(self.log.resolve()),
                }
            )
        )  # fmt: skip
        # Whoever may not change all hosts may see all: the limit is for changes.
        play = plays.Play(
            "playbooks/watch.yml", {}, self.inventory, None, self.folder / plays.SCRATCH, env={"PD_WATCH_JOB": str(job.resolve())}
        )
        play.wait(lambda line: self.tell())
        self.tell()
        if play.rc:
            raise UserError(play.why)
        last = self.entries()[-1:]
        return str(last[0].get("to") or "") if last and last[0]["kind"] == "window" and not self.args.dry_run else ""

    def change(self, ratio: str) -> bool:
        """Run `rebalance.yml`; Ctrl-C does not cut it off. Return whether the deployment has the ratio now."""
        begun, before = time.time(), self.entries()[-1]["ratio"]
        print(f"{clock(begun)}  rebalance.yml -e ratio={ratio}", flush=True)
        log = self.folder / "rebalance.log"
        play = plays.Play("rebalance.yml", {"ratio": ratio}, self.inventory, self.args.limit, self.folder / plays.SCRATCH, log)
        stop: KeyboardInterrupt | None = None
        thread, shown = play.start(), time.monotonic()
        while thread.is_alive():
            try:
                thread.join(0.25)
                if time.monotonic() - shown > _LINE_S:
                    print(f"{clock()}  {play.line}", flush=True)
                    shown = time.monotonic()
            except KeyboardInterrupt as asked:
                if stop is None:
                    print("the change is brought to its end first; once more, and it is cut off", flush=True)
                    stop = asked
                    continue
                play.stop.set()
                thread.join(30)
                plays.end_orphans(self.folder / plays.SCRATCH)
                raise
        took = time.time() - begun
        done = not play.rc
        entry = {"at": round(begun, 1), "kind": "change", "ratio": before, "to": ratio, "took_s": round(took, 1), "ok": done}
        self._note({**entry, "why": play.why})
        self.tell()
        # What a change costs: a load that does not last as long as it took was not worth it.
        self.rest_until = time.time() + max(self.rule.rest_s, took)
        if stop is not None:
            raise stop
        return done

    def _note(self, entry: Json) -> None:
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def entries(self) -> list[Json]:
        """Return the log so far."""
        return [json_of(line) for line in self.log.read_text(encoding="utf-8").splitlines()]

    def tell(self) -> None:
        """Print what came to the log since."""
        found = self.entries()
        for entry in found[self.shown :]:
            if entry["kind"] != "begin":
                print(said(entry, self.args.dry_run), flush=True)
        self.shown = len(found)


def run(args: argparse.Namespace) -> int:
    """Watch and change until the time is over or a human says so; return the exit code. Raise UserError for what cannot be."""
    rule = autoscale.Rule(*_promise(args), patience=args.patience, rest_s=args.rest)
    folder = args.output or ROOT / "results" / f"autoscale-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: name another folder with --output")
    folder.mkdir(parents=True, exist_ok=True)
    what = "nothing is changed (--dry-run)" if args.dry_run else "ratios are changed by rebalance.yml"
    print(
        f"TTFT {rule.ttft_s * 1000:g} ms, TPOT {rule.itl_s * 1000:g} ms are promised; a look every {args.every:g} s; {what}",
        flush=True,
    )
    session, code = Session(args, rule, folder), 0
    try:
        with plays.interruptible():
            code = _turns(session)
    except KeyboardInterrupt:
        print("\nstopped; what is deployed serves on")
    finally:
        _finish(session)
    return code


def _turns(session: Session) -> int:
    failed = 0
    while ratio := session.watch():
        failed = 0 if session.change(ratio) else failed + 1
        if failed >= FAILURES:
            log = session.folder / "rebalance.log"
            print(f"pdbench autoscale: {failed} changes in a row failed; what is deployed serves on. {log}", file=sys.stderr)
            return 1
    return 0


def _promise(args: argparse.Namespace) -> tuple[float, float]:
    """Return the limits of TTFT and TPOT in seconds: as typed, else of the inventory."""
    found = [args.slo_ttft_ms, args.slo_tpot_ms]
    if None in found:
        hosts = plays.resolve(args.inventory, [{}], None)["cases"][0]
        for place, name in enumerate(("bench_slo_ttft_ms", "bench_slo_tpot_ms")):
            said = [own[name] for own in hosts.values() if own.get(name) is not None]
            found[place] = found[place] if found[place] is not None or not said else float(said[0])
    missing = [flag for flag, limit in zip(("--slo-ttft-ms", "--slo-tpot-ms"), found, strict=True) if limit is None]
    if missing:
        raise UserError(f"say what users are promised: {' and '.join(missing)} MS, or bench_slo_ttft_ms and bench_slo_tpot_ms")
    return found[0] / 1000, found[1] / 1000


def clock(at: float | None = None) -> str:
    """Return a moment as the log shows it."""
    return time.strftime("%H:%M:%S", time.localtime(at))


def said(entry: Json, dry_run: bool = False) -> str:
    """Return an entry of the log as a line."""
    head = f"{clock(entry['at'])}  {entry['ratio']}"
    if entry["kind"] == "change":
        how = "done" if entry["ok"] else f"FAILED: {entry['why']}"
        return f"{head} -> {entry['to']}: {how}, {duration(entry['took_s'])}"
    if entry.get("silent"):
        return f"{head}  not judged: {'; '.join(f'{name}: {why}' for name, why in entry['silent'].items())}"
    wish = f": {entry['wish']} wants a worker" if entry["wish"] else ""
    then = f", so {entry['to']}{' it would be' if dry_run else ''}" if entry["to"] else ""
    return f"{head}  {entry['says']}{wish}{then}"


def _finish(session: Session) -> None:
    """Print the table of changes and draw the picture."""
    found = session.entries()
    windows = [entry for entry in found if entry["kind"] == "window"]
    judged = [entry for entry in windows if not entry.get("silent")]
    rows = [
        (clock(e["at"]), e["ratio"], e["to"], "done" if e["ok"] else "failed", duration(e["took_s"]))
        for e in found
        if e["kind"] == "change"
    ]
    if rows:
        print("\n" + table(("at", "from", "to", "", "took"), rows))
    print(f"\n{len(judged)} windows judged, {len(windows) - len(judged)} not, {len(rows)} changes")
    (session.folder / "job.json").unlink(missing_ok=True)
    if judged:
        (session.folder / PICTURE).write_bytes(draw.picture(found))
        print(f"{session.folder}: {LOG}, {PICTURE}{', rebalance.log' if rows else ''}")
