"""The plays of a sweep, driven by ansible-runner: each in a thread, so that the sweep can show how far it is and stop it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ansible_runner

from pdbench.reading import json_of
from pdbench.sweep.checkout import ROOT
from pdbench.sweep.drive import Ended
from pdbench.sweep.grid import Cell, seed
from pdbench.sweep.journal import FAILED, FINISHED, INVALID
from pdlib import processes
from pdlib.errors import UserError

Json = dict[str, Any]
#: Of a sweep's folder: what plays need while they run, and load that an earlier controller left on the client.
SCRATCH, LEFT_OVER = ".plays", "left-over"
_TICK_S = 0.25


@dataclass
class Play:
    """One command; once it ended ``rc``, and ``why``: what the first host that failed said. ``line``: last words.

    ``skip``: tags of tasks that are left out; ``env``: of the play, beside this process's; ``check``: with `--check`.
    """

    playbook: str
    variables: Mapping[str, Any]
    inventory: str
    limit: str | None
    scratch: Path
    log: Path | None = None
    rc: int | None = None
    why: str = ""
    line: str = ""
    skip: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    check: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    #: once it ended; a thread whose `join` was interrupted says that it ended while it runs (bpo-45274, Python before 3.13)
    ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Begin in a thread of its own."""
        threading.Thread(target=self._run, daemon=True).start()

    def wait(self, tick: Callable[[str], None] = lambda line: None) -> None:
        """Run to the end, calling ``tick`` with the play's last line now and then; an interrupt ends the play first."""
        self.start()
        try:
            while not self.ended.wait(_TICK_S):
                tick(self.line)
        except BaseException:
            self.stop.set()
            self.ended.wait(30)
            # ansible-runner ends ansible-playbook; the workers that it forked are in sessions of their own.
            end_orphans(self.scratch)
            raise

    def _run(self) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)
        # Its name on the command line is how a later sweep knows a play that outlived this one.
        folder = Path(tempfile.mkdtemp(dir=self.scratch.resolve()))
        try:
            given = folder / "variables.json"
            given.write_text(json.dumps(dict(self.variables)))
            words = [f"-e @{given}", *(f"--skip-tags {tag}" for tag in self.skip), *(["--check"] if self.check else [])]
            with open(self.log or os.devnull, "a", encoding="utf-8") as log:
                done = ansible_runner.run(
                    private_data_dir=str(folder), project_dir=str(ROOT), playbook=self.playbook, inventory=self.inventory,
                    limit=self.limit, cmdline=" ".join(words), quiet=True, suppress_env_files=True,
                    envvars={**_environment(), **self.env},
                    event_handler=lambda event: self._heard(event, log), cancel_callback=self.stop.is_set,
                )  # fmt: skip
            self.rc = int(done.rc)
            if self.rc and not self.why:
                self.why = f"{self.playbook} ended with exit code {self.rc}: {self.line or done.status}"
        except Exception as error:
            self.rc, self.why = 1, f"{self.playbook} could not be run: {error}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self.ended.set()

    def _heard(self, event: Mapping[str, Any], log: Any) -> bool:
        text = str(event.get("stdout") or "")
        if text:
            log.write(text + "\n")
            log.flush()
            last = text.strip().splitlines()[-1:] or [""]
            self.line = last[0].strip() or self.line
        data = event.get("event_data") or {}
        if event.get("event") in ("runner_on_failed", "runner_on_unreachable") and not data.get("ignore_errors") and not self.why:
            said = str((data.get("res") or {}).get("msg") or text or "no reason was given").replace("Task failed: ", "")
            self.why = f"{data.get('task', '?')} ({data.get('host', '?')}): {' '.join(said.split())[:600]}"
        # Events hold variables: nothing of them stays on disk.
        return False


def _environment() -> dict[str, str]:
    """Return what plays need beside ansible.cfg: ansible-runner puts a folder of its own in the place of our callbacks'."""
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    return {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_CALLBACK_PLUGINS": str(ROOT / "plugins" / "callback"), "PATH": path}


def inventory_path(name: str) -> str:
    """Return an inventory as plays take it; raise UserError when it is not there."""
    for base in (Path.cwd(), ROOT):
        if (base / name).exists():
            return str((base / name).resolve())
    raise UserError(f"inventory {name}: there is no such file or folder")


def resolve(inventory: str, deployments: Sequence[Json], limit: str | None) -> Json:
    """Return what `playbooks/inputs.yml` says of an inventory, for every deployment's variables; contacts no host."""
    with tempfile.TemporaryDirectory(prefix="pdbench-sweep-") as name:
        folder = Path(name)
        (folder / "cases.json").write_text(json.dumps(list(deployments)))
        given = {"sweep_cases": str(folder / "cases.json"), "sweep_inputs": str(folder / "inputs.json")}
        play = Play("playbooks/inputs.yml", given, inventory_path(inventory), limit, folder / SCRATCH)
        play.wait()
        if play.rc:
            raise UserError(f"{inventory}: {play.why}")
        return dict(json_of((folder / "inputs.json").read_text()))


class Plays:
    """The driver of a real sweep: `deploy_pd.yml` and `bench.yml` of this checkout."""

    def __init__(
        self,
        folder: Path,
        limit: str | None,
        loads: Mapping[str, int],
        tick: Callable[[str], None],
        fetched: Set[str] = frozenset(),
        steal: bool = False,
        begun: Iterable[str] = (),
    ):
        """Take what all plays of the sweep share.

        ``loads``: as `grid.loads` numbers them. ``tick``: shows a play's last line. ``fetched``: deployments whose model is
        fetched by us. ``steal``: take over the deployment's lock, once. ``begun``: inventories on which an earlier session began
        a cell, and may have left workers.
        """
        self.folder, self.limit, self.loads, self.tick, self.fetched, self.steal = folder, limit, loads, tick, fetched, steal
        #: inventories on which something of ours may be up
        self.up = list(dict.fromkeys(begun))
        #: whether nothing was measured since the last deploy: a run of somebody else's may still load the workers
        self.fresh = True
        self.fetching: tuple[str, Play] | None = None

    def _play(self, playbook: str, cell: Cell, variables: Mapping[str, Any], log: Path, skip: Sequence[str] = ()) -> Play:
        play = Play(playbook, variables, inventory_path(cell.inventory), self.limit, self.folder / SCRATCH, log, skip=skip)
        play.wait(self.tick)
        return play

    def deploy(self, cell: Cell, folder: Path) -> Ended:
        """Run `deploy_pd.yml`; a cluster that was measured before on another inventory is torn down first."""
        self._end_fetch()
        log = folder / "deploy.log"
        ended = self.take_down(log, keep=cell.inventory)
        if ended.how != FINISHED:
            return ended
        self.up = [cell.inventory]
        given = {**cell.deploy, "steal_lock": True} if self.steal else cell.deploy
        play = self._play("deploy_pd.yml", cell, given, log)
        if play.rc:
            return Ended(FAILED, play.why)
        self.steal, self.fresh = False, True
        return Ended()

    def take_down(self, log: Path, keep: str = "") -> Ended:
        """Run `teardown.yml` for every inventory on which something may be up, but ``keep``."""
        for inventory in [one for one in self.up if one != keep]:
            play = Play("teardown.yml", {}, inventory_path(inventory), self.limit, self.folder / SCRATCH, log)
            play.wait(self.tick)
            if play.rc:
                return Ended(FAILED, f"teardown of {inventory}: {play.why}")
            self.up.remove(inventory)
        return Ended()

    def measure(self, cell: Cell, repeat: int, folder: Path) -> Ended:
        """Run `bench.yml` and put its run where it belongs.

        What `deploy` has just done is not done again (the play refuses another plan than the deployed one), and pictures of
        single runs are left to `pdbench report`: between two cells the hosts wait for the controller.
        """
        staging = folder.with_name(f".{folder.name}")
        staging.mkdir(parents=True, exist_ok=True)
        given = {
            **cell.deploy, **cell.load, "bench_seed": seed(cell, repeat, self.loads), "results_dir": str(staging.resolve()),
            "run_label": f"{cell.id}-{folder.name}",
        }  # fmt: skip
        skip = ["converge", "draw"] if self.fresh else ["converge", "draw", "left_over"]
        play = self._play("bench.yml", cell, given, folder / "bench.log", skip)
        self._collect(staging, folder)
        self.fresh = False
        return verdict(folder, play.rc or 0, play.why)

    def _collect(self, staging: Path, folder: Path) -> None:
        """Move the run into ``folder``, and runs of others that were found on the client beside the cells."""
        latest = staging / "latest"
        runs = sorted(
            path for path in staging.iterdir() if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
        )
        label = f"-{folder.parent.name}-{folder.name}"
        own = latest.resolve() if latest.is_symlink() else next((run for run in runs if run.name.endswith(label)), None)
        for run in runs:
            if own is not None and run.resolve() == own:
                for path in run.iterdir():
                    path.replace(folder / path.name)
            else:
                (self.folder / LEFT_OVER).mkdir(exist_ok=True)
                with contextlib.suppress(OSError):
                    run.replace(self.folder / LEFT_OVER / run.name)
        shutil.rmtree(staging, ignore_errors=True)

    def collect_interrupted(self) -> None:
        """Put what an attempt that was cut off had fetched into its folder."""
        for staging in sorted(self.folder.glob("runs/*/.r*a*")):
            self._collect(staging, staging.with_name(staging.name[1:]))

    def fetch_ahead(self, cell: Cell) -> None:
        """Fetch the model of the next deployment while this one is measured; once for each."""
        if cell.deployment not in self.fetched or (self.fetching and self.fetching[0] == cell.deployment):
            return
        self._end_fetch()
        log = self.folder / "fetch-ahead.log"
        play = Play("playbooks/fetch.yml", cell.deploy, inventory_path(cell.inventory), self.limit, self.folder / SCRATCH, log)
        play.start()
        self.fetching = (cell.deployment, play)

    def _end_fetch(self) -> None:
        """Wait for the fetch: two that write one model would be in each other's way. What it did not do, the deploy does."""
        if self.fetching:
            while not self.fetching[1].ended.wait(_TICK_S):
                self.tick(f"fetching the model: {self.fetching[1].line}")

    def close(self) -> None:
        """End what still runs beside the sweep."""
        if self.fetching:
            self.fetching[1].stop.set()
            self.fetching[1].ended.wait(30)
        end_orphans(self.folder / SCRATCH)


def verdict(folder: Path, rc: int, why: str) -> Ended:
    """Return how a run ended, from the gate's own words where there are any."""
    try:
        judged = json_of((folder / "validity.json").read_text())
    except (OSError, ValueError):
        return Ended(FAILED, why or "bench.yml left no validity.json")
    if not judged["valid"]:
        reasons = [check["message"] for check in judged.get("checks", []) if check.get("ok") is False]
        return Ended(INVALID, "; ".join(reasons)[:1000] or why)
    return Ended(FAILED, why) if rc else Ended(FINISHED)


def end_orphans(scratch: Path) -> list[int]:
    """End plays whose variables lie in ``scratch``, whoever began them (the caller holds the sweep's lock); return their pids."""
    mark = str(scratch.resolve()) + os.sep
    found = [one.pid for one in processes.all_processes() if mark in one.command and one.pid != os.getpid()]
    processes.kill(found, 10.0)
    shutil.rmtree(scratch, ignore_errors=True)
    return found


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a sweep as Ctrl-C does, so that its play is ended, too."""

    def raised(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, raised) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
