"""Bring a host's units to what the plan wants, a few seconds at a time, so that the caller can show progress."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import ssl
import time
import urllib.request
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from . import accounts, ask, caches, containers, folders, keys, processes, role_switch
from .errors import UserError, listing
from .folders import claim
from .managers import MANAGERS, Manager, Supervisord, Systemd, write
from .steps import STEP_S, Outcome
from .units import identity

Json = Dict[str, Any]
_RECORD = "units.json"


def healthy(url: str, timeout_s: float = 3.0) -> bool:
    """Whether ``url`` answers 200; no secret goes there, so nobody asks who it is that answers."""
    try:
        unverified = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), unverified)
        with opener.open(url, timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError, http.client.HTTPException):
        return False


def _read_record(path: Path) -> Json:
    try:
        found = json.loads(path.read_text())
        return dict(found) if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def became(state_dir: str, manager: str) -> Optional[Dict[str, str]]:
    """Return what became of each unit that a deploy started here: its process is the ``same``, another ``anew``, or ``ended``.

    None where the service manager does not say.
    """
    record = _read_record(Path(state_dir) / _RECORD)
    try:
        status = MANAGERS[manager](state_dir, "", "").status() if record else {}
    except (UserError, OSError):
        return None
    pids = {name: status[name].pid if name in status else 0 for name in record}
    return {name: "ended" if not pid else "same" if pid == record[name].get("pid") else "anew" for name, pid in pids.items()}


class Reconciler:
    """One host's units. The record ``units.json`` says what each running unit was started as."""

    def __init__(
        self,
        state_dir: str,
        install_dir: str,
        manager: str,
        ratio: str,
        units: Sequence[Json],
        check: bool,
        secrets: Optional[Mapping[str, str]] = None,
        launcher: str = "",
        user: str = "",
        shipped: Optional[Mapping[str, str]] = None,
        keep: Sequence[str] = (),
        deployment: str = "",
    ):
        self.deployment = deployment
        self.keep, self.secrets = set(keep), dict(secrets or {})
        #: unit -> what it does instead of being ready
        self.waits: Dict[str, str] = {}
        self.user = user if manager == "systemd" else ""
        if self.user:
            # sudo may have a stricter one, and then the user could not reach what is made here.
            os.umask(0o022)
        self.home, self.install_dir = Path(state_dir), install_dir
        self.manager: Manager = MANAGERS[manager](state_dir, install_dir, ratio)
        self.units = {unit["name"]: unit for unit in units}
        self.check = check
        self.outcome = Outcome()
        self.record_file = self.home / _RECORD
        self.record: Json = _read_record(self.record_file)
        #: A key lies where a unit reads it.
        read = [name for name in self.secrets if any(keys.reads(unit, name) for unit in units)]
        self.private = {keys.FILES[name]: (self.secrets[name], 0o600) for name in read}
        if self.secrets and launcher:
            self.private[keys.LAUNCHER] = (launcher, 0o700)
        self.shipped = {str(self.home / "files" / name): text for name, text in (shipped or {}).items()}

    def _save(self) -> None:
        write(self.record_file, json.dumps(self.record, indent=1, sort_keys=True) + "\n", 0o600)

    def _identity(self, name: str) -> str:
        """What the unit is started as: its command line, its keys, the files it names, the virtualenv that it runs from."""
        stamp = Path(self.units[name]["argv"][0]).parent.parent / ".pd-stamp"
        installed = _text(stamp)
        if "container" in self.units[name]:
            installed += _text(Path(self.units[name]["container"]["record"]))
        named = "".join(text for path, text in sorted(self.shipped.items()) if path in self.units[name]["argv"])
        files = hashlib.sha256(named.encode()).hexdigest() if named else ""
        # The hub's token is read when something is downloaded.
        read = [self.secrets[key] for key in sorted(self.secrets) if key != keys.HUB and keys.reads(self.units[name], key)]
        secret = "".join(hashlib.sha256(key.encode()).hexdigest() for key in read)
        return identity(self.units[name], secret + installed + files)

    def _files(self, name: str) -> str:
        """A hash of the unit's own files as they are; "" when they are not there."""
        texts = [_text(path) for path in sorted(self.manager.files([self.units[name]])) if path.stem == name]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16] if any(texts) else ""

    def _edited(self, name: str) -> bool:
        """Whether somebody changed the unit's files after they were written: what runs may have been started from those."""
        written = self.record.get(name, {}).get("files")
        return written is not None and self._files(name) not in ("", written)

    def _change(self, text: str) -> None:
        if text not in self.outcome.changed:
            self.outcome.changed.append(text)

    # -- files

    def _write_files(self) -> None:
        if not self.check:
            folders.use(self.install_dir, str(self.home))
            folders.enroll(str(self.home), self.deployment)
        if not self.units:
            if not self.check:
                self._remove_private()
            return
        reload = isinstance(self.manager, Supervisord) and not self.manager.status()
        files = self.manager.files(list(self.units.values()))
        if not self.check:
            self._make_room()
        for path, (text, mode) in files.items():
            before = _text(path)
            if before != text:
                header = str(path)
                self.outcome.diff.append({"before_header": header, "after_header": header, "before": before, "after": text})
                self._change(f"{'would write' if self.check else 'wrote'} {path.name}")
            if not self.check and write(path, text, mode):
                reload = reload or path.suffix in (".conf", ".service", ".target")
        if not self.check:
            self._note_files()
            self._write_private()
            if reload:
                self.manager.reload()

    def _check_files(self) -> None:
        """Refuse units that systemd would not take whole, while all is still as it was."""
        if isinstance(self.manager, Systemd) and self.units:
            files = self.manager.files(list(self.units.values()))
            if any(_text(path) != text for path, (text, _) in files.items()):
                self.manager.check(files)

    def _make_room(self) -> None:
        """Make the folders that units run in, and the account that they run as."""
        claim(str(self.home), shared=bool(self.user))
        folders.enroll(str(self.home), self.deployment)
        in_containers = [unit["container"] for unit in self.units.values() if "container" in unit]
        containers.note(str(self.home), [container["runtime"] for container in in_containers])
        if self.user and accounts.ensure(self.user):
            self._change(f"made user {self.user}")
        for unit in self.units.values():
            if unit.get("cache_dir"):
                claim(self.install_dir, shared=bool(self.user))
                if caches.make(unit["cache_dir"], self.install_dir, unit.get("user", "") if self.user else ""):
                    self._change(f"made {unit['cache_dir']}")
        for folder in (folder for container in in_containers for folder in container["folders"]):
            Path(folder).mkdir(parents=True, exist_ok=True)
        for name in self.units:
            folder = Path(processes.work_dir(str(self.home), name))
            folder.mkdir(parents=True, exist_ok=True)
            if self.user:
                accounts.own(folder, self.user)

    def _note_files(self) -> None:
        """Remember the files of units that stay as they run; those that start are remembered then."""
        stale = [name for name in self.units if name in self.record and self.record[name].get("files") != self._files(name)]
        for name in stale:
            self.record[name]["files"] = self._files(name)
        if stale:
            self._save()

    def _write_private(self) -> None:
        """Keep shipped files where engines read them, and keys where units and the load generator do, or nowhere."""
        for path, text in self.shipped.items():
            if write(Path(path), text, 0o644):
                self._change(f"wrote files/{Path(path).name}")
        for name, (text, mode) in self.private.items():
            if write(self.home / name, text, mode):
                self._change(f"wrote {name}")
            if self.user:
                accounts.own(self.home / name, self.user)
        self._remove_private()

    def _remove_private(self) -> None:
        for key, file in keys.FILES.items():
            if key not in self.secrets and (self.home / file).exists():
                (self.home / file).unlink()
                self._change(f"removed {file}")

    def _forget(self, names: Sequence[str]) -> None:
        """Remove the files of units that are gone."""
        if not names:
            return
        for name in names:
            for path in (f"conf.d/{name}.conf", f"units/{name}.sh", f"units/{name}.env"):
                (self.home / path).unlink(missing_ok=True)
            self.record.pop(name, None)
        self._save()
        if isinstance(self.manager, Systemd):
            self.manager.remove(names)
        else:
            self.manager.reload()

    # -- processes

    def _to_stop(self) -> Tuple[List[str], List[str]]:
        """Return (surplus units, units to restart)."""
        status = self.manager.status()
        known = set(status) | set(self.record)
        surplus = sorted(name for name in known if name not in self.units)
        restart = sorted(
            name
            for name, unit in self.units.items()
            if name in status
            and status[name].state in ("running", "starting", "stopping")
            and (self.record.get(name, {}).get("identity") != self._identity(name) or self._edited(name))
        )
        return surplus, restart

    def _stop(self, names: Sequence[str], end: float) -> List[str]:
        """Ask units to stop; return those that still run at ``end``."""
        status = self.manager.status()
        # One that is dead may wait for its next start.
        self.manager.stop([name for name in names if name in status and status[name].state != "stopping"])
        left = list(names)
        while left and time.monotonic() < end:
            status = self.manager.status()
            left = [name for name in left if name in status and status[name].state in ("running", "starting", "stopping")]
            if left:
                time.sleep(0.1)
        containers.remove(str(self.home), [name for name in names if name not in left])
        for name in names:
            if name not in left:
                processes.kill([p.pid for p in processes.ours(str(self.home), name)], 5.0)
        return left

    def _check_ports(self, names: Sequence[str]) -> None:
        wanted = [(self.units[name]["listen"], port) for name in names for port in self.units[name]["ports"]]
        taken = processes.taken_ports(wanted)
        if taken:
            lines = []
            for name in names:
                for port in self.units[name]["ports"]:
                    owner = taken.get((self.units[name]["listen"], port))
                    if owner:
                        lines.append(f"port {port} of {self.units[name]['listen']}, which {name} needs, is held by {owner}")
            raise UserError("; ".join(lines) + ". Stop it, or set another worker_port_base, bootstrap_port_base or router_port")

    def _start(self, names: Sequence[str]) -> None:
        containers.remove(str(self.home), names)
        for name in names:
            processes.kill([p.pid for p in processes.ours(str(self.home), name)], 5.0)
        self._check_ports(names)
        self.manager.start(names)
        for name in names:
            self.record[name] = {"identity": self._identity(name), "started": time.time(), "files": self._files(name)}
        self._save()

    def _fail_on_death(self) -> None:
        """Raise UserError with the end of the log when a unit ended, or was started anew, before it was ready."""
        status = self.manager.status()
        for name in self.units:
            entry, now = self.record.setdefault(name, {}), status.get(name)
            if entry.get("ready") or "identity" not in entry:
                continue
            if now and now.state != "dead" and (not now.pid or entry.get("pid") in (None, now.pid)):
                entry["pid"] = now.pid or entry.get("pid")
                continue
            detail = f" ({now.detail})" if now and now.state == "dead" and now.detail else ""
            raise UserError(f"{name} died before it was ready{detail}. The end of its log:\n{self.manager.log_tail(name)}")

    def _check_kept(self, restart: Sequence[str]) -> None:
        """Refuse to restart units that serve while others change (rebalance.yml)."""
        kept = [name for name in restart if name in self.keep]
        if kept:
            raise UserError(
                f"{listing(kept)} would restart while it serves: since it started, its files, its key, its virtualenv or what it is "
                "started as changed. Nothing was changed here; deploy_pd.yml restarts what has to be, and then the ratio can change"
            )

    # -- the step

    def step(self, resumed: bool) -> Outcome:
        """Do what can be done in a few seconds towards the wanted state; ``resumed``: this is not the first step."""
        end = time.monotonic() + STEP_S
        if not resumed:
            # What died under an earlier deploy, and was started anew by its manager since, is not this one's failure.
            for entry in self.record.values():
                if not entry.get("ready"):
                    entry.pop("pid", None)
        folders.refuse_others({"": folders.deployment(str(self.home))}, self.deployment)
        if isinstance(self.manager, Systemd):
            self.manager.refuse_others(self.units)
        surplus, restart = self._to_stop()
        self._check_kept(restart)
        if self.check:
            return self._foretell(surplus, restart)
        self._check_files()
        for name in surplus:
            self._change(f"stopped {name}")
        left = self._stop([*surplus, *restart], end)
        if left:
            self.outcome.message = f"stopping {listing(left)}"
            return self.outcome
        self._forget(surplus)
        for name in restart:
            self._change(f"restarted {name}")
            self.record.pop(name, None)
        self._write_files()
        if resumed:
            self._fail_on_death()
        status = self.manager.status() if self.units else {}
        idle = [name for name in self.units if name not in status or status[name].state not in ("running", "starting")]
        if idle:
            for name in idle:
                if f"restarted {name}" not in self.outcome.changed:
                    self._change(f"started {name}")
            self._start(idle)
        return self._wait(end)

    def _wait(self, end: float) -> Outcome:
        waiting = list(self.units)
        while True:
            self._fail_on_death()
            waiting = [name for name in waiting if not self._ready(name)]
            if not waiting or time.monotonic() > end:
                break
            time.sleep(0.25)
        for name in self.units:
            if name not in waiting:
                self.record[name]["ready"] = True
        if self.units:
            self._save()
        self.outcome.done = not waiting
        self.outcome.message = "; ".join(self._describe(name) for name in waiting)
        return self.outcome

    def _ready(self, name: str) -> bool:
        url: Optional[str] = self.units[name]["health_url"]
        ready = healthy(url) if url else bool(self.record[name].get("pid"))
        return self._has_role(name) if ready and self.units[name].get("switch") else ready

    def _has_role(self, name: str) -> bool:
        """Whether a worker whose role can change has the one that it should have; it is told so, where it has another."""

        def asked(method: str, url: str, body: Optional[Json]) -> Tuple[int, str]:
            # Where there is an admin key, what changes a worker takes no other.
            key = (self.secrets.get(keys.ADMIN) if url.endswith(role_switch.PATH) else None) or self.secrets.get(keys.API)
            # CUDA graphs of decode may be made first.
            return ask.request(method, url, key, body, 120.0 if body else 5.0)

        done, said = role_switch.bring(name, self.units[name]["switch"], asked)
        self.waits[name] = "" if done else said
        if done and said:
            self._change(said)
        return done

    def _describe(self, name: str) -> str:
        if self.waits.get(name):
            return self.waits[name]
        started = self.record.get(name, {}).get("started")
        age = f"{time.time() - started:.0f} s" if started else "new"
        last = [line.strip() for line in self.manager.log_tail(name, 1).splitlines() if line.strip()]
        return f"{name} is starting ({age}{': ' + last[-1][:100] if last else ''})"

    def _foretell(self, surplus: Sequence[str], restart: Sequence[str]) -> Outcome:
        status = self.manager.status()
        if self.user and self.units and not accounts.exists(self.user):
            self._change(f"would make user {self.user}")
        for folder in sorted({unit["cache_dir"] for unit in self.units.values() if unit.get("cache_dir")}):
            if not Path(folder).is_dir():
                self._change(f"would make {folder}")
        for name in surplus:
            self._change(f"would stop {name}")
        for name in restart:
            self._change(f"would restart {name}")
        for name in self.units:
            if name not in status or status[name].state not in ("running", "starting"):
                self._change(f"would start {name}")
        self._write_files()
        self.outcome.done = True
        return self.outcome


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
