"""Take a deployment off a host, by what is there."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import List, Sequence, Set

from . import accounts, caches, containers, firewall_host, folders, processes
from .errors import listing
from .firewall import UNIT as FIREWALL
from .managers import MANAGERS, Manager, Systemd
from .runtimes import container_name
from .steps import STEP_S, Outcome


def remove_everything(state_dir: str, install_dir: str, managers: Sequence[str], purge: bool, check: bool) -> Outcome:
    """Teardown: end our processes, remove units, configuration and runtime state; with ``purge`` the installs, too.

    Works from what is on the host, not from a plan, so that it also cleans up after a deploy that was killed.
    """
    outcome = Outcome(done=True)
    home = Path(state_dir)
    own: List[Path] = []
    marks: Set[str] = set()
    for name in managers:
        manager: Manager = MANAGERS[name](state_dir, install_dir, "")
        running = sorted(unit for unit, status in manager.status().items())
        unit_files = manager.own_units() if isinstance(manager, Systemd) else []
        outcome.changed += [f"stopped {unit}" for unit in running]
        own += unit_files
        if check:
            # What it would end by stopping is no stray.
            marks |= {processes.work_dir(os.path.realpath(state_dir), unit) for unit in [*running, "supervisord"]}
            continue
        end = time.monotonic() + STEP_S
        # One that is dead may wait for its next start.
        manager.stop([unit for unit, status in manager.status().items() if status.state != "stopping"])
        while time.monotonic() < end:
            busy = [unit for unit, status in manager.status().items() if status.state in ("running", "starting", "stopping")]
            if not busy:
                break
            time.sleep(0.1)
        else:
            outcome.done, outcome.message = False, f"stopping {listing(busy)}"
            return outcome
        if isinstance(manager, Systemd) and unit_files:
            manager.remove([path.stem for path in unit_files])
        if unit_files or name == "supervisord":
            manager.shutdown()
    in_containers = containers.ours(state_dir)
    if check:
        # What it would end by stopping its unit is no stray, either.
        ended = {container_name(Path(mark).name, state_dir) for mark in marks}
        in_containers = {name: client for name, client in in_containers.items() if name not in ended}
    else:
        containers.end(in_containers)
    outcome.changed += [f"ended container {name}" for name in sorted(in_containers)]
    strays = [p for p in processes.ours(state_dir) if p.cwd not in marks]
    outcome.changed += [f"ended process {p.pid} ({p.command[:40].strip()})" for p in strays]
    if not check:
        processes.kill([p.pid for p in strays], 10.0)
    if firewall_host.owner() == state_dir:
        own.append(Systemd.UNITS / FIREWALL)
    outcome.changed += firewall_host.remove(state_dir, check)
    if not check:
        folders.leave(install_dir, state_dir)
    users = folders.users(install_dir, state_dir)
    if purge and users:
        outcome.changed.append(f"kept {install_dir}: used by {listing(users)} (as {install_dir}/users says)")
    elif purge:
        outcome.changed += caches.remove(install_dir, check)
    for folder in [home, Path(install_dir)] if purge and not users else [home]:
        unfetched = sorted((folder / "runs").glob("*/"))
        if unfetched and not purge:
            outcome.changed += [f"kept {run}: never fetched" for run in unfetched]
            if not check:
                for path in folder.iterdir():
                    if path.name not in (".pd", "runs"):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif folder.exists():
            outcome.changed.append(f"removed {folder}")
            if not check:
                folders.remove(folder)
    if "systemd" in managers and not set(Systemd.UNITS.glob("pd-*.service")) - set(own):
        for account in accounts.ours():
            for path in accounts.leftovers(account):
                weights = caches.weights_in(path)
                if weights:
                    outcome.changed.append(f"kept {path}: it holds model weights ({weights.name})")
                    continue
                outcome.changed.append(f"removed {path}")
                if not check:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            if purge:
                outcome.changed.append(f"removed user {account}" if check else accounts.remove(account))
    return outcome
