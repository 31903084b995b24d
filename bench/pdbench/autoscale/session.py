"""One session: a play that watches, a play that changes the ratio, in turns; a log of both, a table and a picture at the end."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pdbench.advise.cli import extra
from pdbench.autoscale import draw
from pdbench.reading import json_of
from pdbench.sweep import plays
from pdbench.sweep.checkout import ROOT
from pdlib import autoscale, settings
from pdlib.errors import UserError
from pdlib.tables import duration, table

Json = dict[str, Any]
LOG, PICTURE = "autoscale.jsonl", "autoscale.png"
#: so many failures in a row, of changes or of attempts to watch, and a human is needed
FAILED, UNWATCHED = 2, 6
_LINE_S = 10.0
#: what a play says when somebody else holds the deployment's lock
_HELD = "is being changed by"
#: a change that was refused is not asked for again for so long
UNFIT_S = 600.0


class SessionOverError(Exception):
    """A session that ran cannot go on; what is deployed serves on."""


class Session:
    """What turns share: where the log is, and the rule with the rest that the last change asks for."""

    def __init__(self, args: argparse.Namespace, rule: autoscale.Rule, folder: Path, inventory: str, given: Json) -> None:
        """Begin a log in ``folder``; ``given``: variables of the user for every play."""
        self.args, self.rule, self.folder, self.inventory, self.given = args, rule, folder, inventory, given
        self.log = folder / LOG
        self.until = time.time() + args.seconds if args.seconds else None
        self.rest_until = 0.0
        self.stopping = False
        self.windows = self.judged = 0
        #: the ratio that was last seen, and the one that the rule asks for
        self.ratio: str | None = None
        self.to = ""
        #: changes (from, to) that `rebalance.yml --check` agreed to, and those that it refused, until when
        self.fit: set[tuple[str | None, str]] = set()
        self.unfit: dict[tuple[str | None, str], float] = {}
        self._read = 0
        begin = {"at": round(time.time(), 1), "kind": "begin", "schema": 1, "rule": asdict(rule), "every_s": args.every}
        self._note({**begin, "dry_run": args.dry_run})
        self.tell()

    def watch(self) -> str:
        """Return the ratio to change to, "" once the time is over.

        Raise UserError when nothing could be watched from the start, SessionOverError when it no longer can be.
        """
        for attempt in range(1, UNWATCHED + 1):
            job = self.folder / "job.json"
            job.write_text(json.dumps(self._job()))
            # Whoever may not change all hosts may see all: the limit is for changes.
            env = {"PD_WATCH_JOB": str(job.resolve())}
            play = plays.Play("playbooks/watch.yml", self.given, self.inventory, None, self._scratch, env=env)
            self.to = ""
            play.wait(lambda line: self.tell())
            self.tell()
            if play.rc == 0:
                return self.to
            if not self.windows:
                raise UserError(play.why)
            say(f"{clock()}  cannot be watched ({attempt} of {UNWATCHED}): {play.why}")
            time.sleep(self.args.every)
        raise SessionOverError(play.why)

    def fits(self, ratio: str) -> bool:
        """Return whether `rebalance.yml --check` agrees to a change; what it refuses is not asked for again for a while."""
        change = (self.ratio, ratio)
        if change in self.fit:
            return True
        begun = time.time()
        play = plays.Play(
            "rebalance.yml", {**self.given, "ratio": ratio}, self.inventory, self.args.limit, self._scratch, check=True
        )
        play.wait()
        entry = {
            "at": round(begun, 1),
            "kind": "check",
            "ratio": self.ratio,
            "to": ratio,
            "took_s": round(time.time() - begun, 1),
        }
        self._note({**entry, "ok": play.rc == 0, "why": play.why})
        self.tell()
        if play.rc == 0:
            self.fit.add(change)
            return True
        self.unfit[change] = time.time() + UNFIT_S
        return False

    def change(self, ratio: str) -> bool | None:
        """Run `rebalance.yml`; the first Ctrl-C does not cut it off.

        Return whether the deployment has the ratio now, None when somebody else was at it.
        """
        begun, before = time.time(), self.ratio
        say(f"{clock(begun)}  rebalance.yml -e ratio={ratio}")
        log = self.folder / "rebalance.log"
        play = plays.Play("rebalance.yml", {**self.given, "ratio": ratio}, self.inventory, self.args.limit, self._scratch, log)
        play.start()
        self._see_through(play, ratio)
        took, done = time.time() - begun, play.rc == 0
        entry = {"at": round(begun, 1), "kind": "change", "ratio": before, "to": ratio, "took_s": round(took, 1), "ok": done}
        self._note({**entry, "why": play.why})
        self.tell()
        # What a change costs: a load that does not last as long as it took was not worth it.
        self.rest_until = time.time() + max(self.rule.rest_s, took)
        return None if not done and _HELD in play.why else done

    def _see_through(self, play: plays.Play, ratio: str) -> None:
        """Wait until a change has ended; a second Ctrl-C ends it, and is raised."""
        shown = time.monotonic()
        while True:
            try:
                while not play.ended.wait(0.25):
                    if time.monotonic() - shown > _LINE_S:
                        say(f"{clock()}  {play.line}")
                        shown = time.monotonic()
                return
            except KeyboardInterrupt:
                if self.stopping:
                    play.stop.set()
                    play.ended.wait(30)
                    plays.end_orphans(self._scratch)
                    entry = {"at": round(time.time(), 1), "kind": "change", "ratio": self.ratio, "to": ratio, "took_s": 0.0}
                    self._note({**entry, "ok": False, "why": "cut off"})
                    say(
                        f"a worker may be out of the router: ansible-playbook rebalance.yml -e ratio={ratio} completes the change"
                    )
                    raise
                self.stopping = True
                say("the change is brought to its end first; Ctrl-C once more cuts it off")

    def leave(self) -> None:
        """Go on as after a change."""
        self.rest_until = time.time() + self.rule.rest_s

    def rest(self) -> None:
        """Wait until a change may follow the last one."""
        time.sleep(max(0.0, min(self.rest_until, self.until or self.rest_until) - time.time()))

    @property
    def over(self) -> bool:
        """Whether the time is over, or a human said so."""
        return self.stopping or (self.until is not None and time.time() >= self.until)

    @property
    def _scratch(self) -> Path:
        return self.folder / plays.SCRATCH

    def _job(self) -> Json:
        unfit = [change for change, until in self.unfit.items() if until > time.time()]
        return {
            "rule": asdict(self.rule), "every_s": self.args.every, "until": self.until, "rest_until": self.rest_until,
            "unfit": unfit, "log": str(self.log.resolve()), "pid": os.getpid(),
        }  # fmt: skip

    def _note(self, entry: Json) -> None:
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def tell(self) -> None:
        """Print what came to the log since; a line that is being written waits."""
        with open(self.log, "rb") as file:
            file.seek(self._read)
            fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            entry = json_of(line.decode())
            if entry["kind"] == "begin":
                continue
            if entry["kind"] == "window":
                self.windows += 1
                self.judged += not entry.get("silent")
                self.ratio, self.to = entry["ratio"] or self.ratio, str(entry.get("to") or "")
            say(said(entry, self.args.dry_run))

    def entries(self) -> list[Json]:
        """Return the whole log."""
        return [json_of(line) for line in self.log.read_text(encoding="utf-8").splitlines()]


def say(text: str) -> None:
    """Print a line; when nobody reads any more (a closed terminal, `| tee` that ended), the log has it."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(args: argparse.Namespace) -> int:
    """Watch and change until the time is over or a human says so; return the exit code. Raise UserError for what cannot be."""
    inventory, given = plays.inventory_path(args.inventory), extra(args.extra)
    settings.check_typed(given, args.extra)
    rule = autoscale.Rule(*_promise(args, given), patience=args.patience, rest_s=args.rest)
    folder = args.output or ROOT / "results" / f"autoscale-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: name another folder with --output")
    folder.mkdir(parents=True, exist_ok=True)
    what = "nothing is changed (--dry-run)" if args.dry_run else "ratios are changed by rebalance.yml"
    say(f"TTFT {rule.ttft_s * 1000:g} ms, TPOT {rule.itl_s * 1000:g} ms are promised; a look every {args.every:g} s; {what}")
    session, code = Session(args, rule, folder, inventory, given), 0
    try:
        with plays.interruptible():
            _turns(session)
    except KeyboardInterrupt:
        session.stopping = True
    except SessionOverError as why:
        print(f"pdbench autoscale: {why}", file=sys.stderr)
        code = 1
    finally:
        _finish(session)
    return code


def _turns(session: Session) -> None:
    """Watch and change in turns. A change that fails is typed again after its rest, which completes it."""
    while not session.over and (ratio := session.watch()):
        if not session.fits(ratio) or session.args.dry_run:
            session.leave()
            continue
        for attempt in range(1, FAILED + 1):
            done = session.change(ratio)
            if done is not False:
                break
            if attempt == FAILED or session.stopping:
                again = f"ansible-playbook rebalance.yml -e ratio={ratio} completes it"
                raise SessionOverError(f"the change to {ratio} failed; {again}. {session.folder / 'rebalance.log'}")
            session.rest()


def _promise(args: argparse.Namespace, given: Json) -> tuple[float, float]:
    """Return the limits of TTFT and TPOT in seconds: as typed, else of the inventory."""
    found = [args.slo_ttft_ms, args.slo_tpot_ms]
    if None in found:
        hosts = plays.resolve(args.inventory, [given], None)["cases"][0]
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
    head = f"{clock(entry['at'])}  {entry['ratio'] or '?'}"
    if entry["kind"] == "check":
        return f"{head} -> {entry['to']}: {'it fits' if entry['ok'] else 'not possible: ' + entry['why']} (rebalance.yml --check)"
    if entry["kind"] == "change":
        held = _HELD in entry["why"]
        how = "done" if entry["ok"] else f"{'postponed' if held else 'FAILED'}: {entry['why']}"
        return f"{head} -> {entry['to']}: {how}, {duration(entry['took_s'])}"
    if entry.get("silent"):
        return f"{head}  not judged: {'; '.join(f'{name}: {why}' for name, why in entry['silent'].items())}"
    wish = f": {entry['wish']} wants a worker" if entry["wish"] else ""
    then = f", so {entry['to']}{' it would be' if dry_run else ''}" if entry["to"] else ""
    then = f", but {entry['unfit']} is not possible" if entry.get("unfit") else then
    return f"{head}  {entry['says']}{wish}{then}"


def _finish(session: Session) -> None:
    """Print the table of changes and draw the picture; nothing of it may take the place of how the session ended."""
    with contextlib.suppress(OSError):
        (session.folder / "job.json").unlink(missing_ok=True)
        session._scratch.rmdir()
    if not session.windows:
        with contextlib.suppress(OSError):
            session.log.unlink()
            session.folder.rmdir()
        return
    found = session.entries()
    rows = [
        (clock(e["at"]), e["ratio"], e["to"], "done" if e["ok"] else "failed", duration(e["took_s"]))
        for e in found
        if e["kind"] == "change"
    ]
    if rows:
        say("\n" + table(("at", "from", "to", "", "took"), rows))
    say(f"\n{session.judged} windows judged, {session.windows - session.judged} not, {len(rows)} changes")
    if session.judged:
        try:
            (session.folder / PICTURE).write_bytes(draw.picture(found))
        except (OSError, ValueError) as why:
            say(f"no {PICTURE}: {why}")
    say(f"{session.folder}: {', '.join(sorted(path.name for path in session.folder.iterdir()))}")
