"""A host's firewall: the ruleset (firewall.py) is loaded, stays over a reboot, and goes whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from . import firewall, processes
from .errors import UserError, listing
from .managers import Systemd, write

#: What nft said of the table once it was loaded: a table that was edited or flushed since says something else.
_LOADED = "firewall.loaded"


@dataclass
class Outcome:
    """What was done, or would be; ``closed``: programs of others at ports that the ruleset closes."""

    changed: List[str] = field(default_factory=list)
    diff: List[Dict[str, str]] = field(default_factory=list)
    closed: List[str] = field(default_factory=list)


def _run(*command: str, text: Optional[str] = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def find_nft() -> str:
    """Return where nft is, "" where the host has none."""
    return shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or ""


def _table(nft: str) -> str:
    """Return the table as the kernel has it, without its counters; "" where there is none."""
    return _run(nft, "-s", "list", "table", "inet", firewall.TABLE).stdout


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def intact(state_dir: str) -> bool:
    """Whether the table is as it was when it was loaded."""
    nft = find_nft()
    table = _table(nft) if nft else ""
    return bool(table) and table == _text(Path(state_dir) / _LOADED)


def owner() -> str:
    """Return the state directory of the deployment that has a firewall on this host, "" where none has."""
    match = re.search(rf'^ExecStart=nft -f "(.*)/{re.escape(firewall.FILE)}"$', _text(Systemd.UNITS / firewall.UNIT), re.M)
    return match[1].replace("%%", "%") if match else ""


def apply(state_dir: str, text: str, check: bool) -> Outcome:
    """Load a ruleset, now and whenever the host starts; raise UserError, with nothing changed, where that cannot be."""
    if os.geteuid():
        raise UserError("firewall: true needs root on this host: set ansible_become, or leave firewall out of its host_vars")
    nft, other = find_nft(), owner()
    if not nft:
        raise UserError("firewall: true needs nft, which this host has not: apt-get install nftables (or its like) there")
    if other not in ("", state_dir):
        raise UserError(
            f"the deployment in {other} has a firewall on this host, and a host has one: firewall: false for one of them"
        )
    tried = _run(nft, "-c", "-f", "-", text=text)
    if tried.returncode:
        said = " ".join(tried.stderr.split())[:300]
        raise UserError(f"nft refuses the ruleset ({said}): a container may not have one (firewall: false in its host_vars)")
    outcome, unit = Outcome(), Systemd.UNITS / firewall.UNIT
    wanted = {Path(state_dir) / firewall.FILE: (text, 0o600), unit: (firewall.unit(state_dir), 0o644)}
    for path, (new, _) in wanted.items():
        before = _text(path)
        if before != new:
            outcome.diff.append({"before_header": str(path), "after_header": str(path), "before": before, "after": new})
    table, loaded = _table(nft), Path(state_dir) / _LOADED
    if not (outcome.diff or not table or table != _text(loaded) or not _in_force()):
        return outcome
    outcome.changed.append("would load the firewall" if check else "loaded the firewall")
    outcome.closed = _others(state_dir, text)
    if check:
        return outcome
    if _text(unit) != wanted[unit][0]:
        Systemd(state_dir, "", "").check({unit: wanted[unit]})
    for path, (new, mode) in wanted.items():
        write(path, new, mode)
    # Enabling reads the unit files anew.
    for words in (("enable", "--quiet"), ("reload-or-restart",)):
        done = _run("systemctl", *words, firewall.UNIT)
        if done.returncode:
            raise UserError(f"systemctl {words[0]} {firewall.UNIT}: {done.stderr.strip() or done.stdout.strip()}")
    write(loaded, _table(nft), 0o600)
    return outcome


def _in_force() -> bool:
    """Whether systemd loads the ruleset when the host starts, and has done so."""
    shown = _run("systemctl", "show", "-p", "ActiveState,UnitFileState", firewall.UNIT).stdout.split()
    return {"ActiveState=active", "UnitFileState=enabled"} <= set(shown)


def _others(state_dir: str, text: str) -> List[str]:
    """Return what listens for other hosts at ports that a ruleset closes, and is not the deployment's."""
    spans = firewall.closed(text)
    own = processes.sockets(process.pid for process in processes.ours(state_dir))
    found: Dict[int, Any] = {}
    for address, port, inode in processes.listeners():
        if inode not in own and not ip_address(address).is_loopback and any(first <= port <= last for first, last in spans):
            found[port] = (address, port)
    held = processes.taken_ports(list(found.values()))
    return [f"port {port}: {' '.join(holder.split())}" for (_, port), holder in sorted(held.items(), key=lambda row: row[0][1])]


def remove(state_dir: str, check: bool) -> List[str]:
    """Take the firewall of a deployment off this host; return what was done, nothing where it has none."""
    files = [Path(state_dir) / name for name in (firewall.FILE, _LOADED)]
    ours, there = owner() == state_dir, [path for path in files if path.exists()]
    if not ours and not there:
        return []
    nft = find_nft()
    if not check:
        if ours:
            _quietly(["systemctl", "disable", "--now", "--quiet", firewall.UNIT])
            (Systemd.UNITS / firewall.UNIT).unlink(missing_ok=True)
            _quietly(["systemctl", "daemon-reload"])
            _quietly(["systemctl", "reset-failed", firewall.UNIT])
        # Where a deploy was cut short, or the unit was edited, its table may still be there.
        if nft and not owner() and _table(nft):
            done = _run(nft, "delete", "table", "inet", firewall.TABLE)
            if done.returncode:
                raise UserError(f"nft delete table inet {firewall.TABLE}: {done.stderr.strip()}")
        for path in there:
            path.unlink()
    return ["removed the firewall"]


def _quietly(command: Sequence[str]) -> None:
    subprocess.run(command, capture_output=True, check=False)


def says(closed: Sequence[str]) -> str:
    """Return the warning about programs of others that a ruleset closes, "" for none."""
    if not closed:
        return ""
    return (
        f"the firewall closes ports at which programs of others listen, to all but the deployment's hosts: {listing(closed)}. "
        "firewall_spared_ports leaves ports out"
    )
