"""The deployed plan on the router's host: kept atomically, changed by one command at a time."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

from .errors import UserError
from .folders import claim
from .managers import write
from .plan_file import newer

Json = Dict[str, Any]


def read(state_dir: str) -> Optional[Json]:
    """Return the deployed plan, None when nothing is deployed."""
    path = Path(state_dir) / "plan.json"
    try:
        plan = dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): teardown.yml removes it, and deploy_pd.yml makes it anew") from None
    if later := newer(plan):
        raise UserError(f"{path}: {later}; teardown.yml of all hosts removes it")
    return plan


def store(state_dir: str, plan: Mapping[str, Any]) -> bool:
    """Keep ``plan`` as the deployed one; return whether it was another before."""
    return write(Path(state_dir) / "plan.json", json.dumps(plan, indent=1, sort_keys=True) + "\n", 0o600)


def forget(state_dir: str, hosts: Sequence[str], check: bool) -> bool:
    """Take the workers of hosts that were torn down out of the deployed plan; return whether it had any."""
    plan = read(state_dir)
    if plan is None:
        return False
    left = [w for w in plan["workers"] if not any(rank["host"] in hosts for rank in w["ranks"])]
    if len(left) == len(plan["workers"]):
        return False
    if not check:
        store(state_dir, {**plan, "workers": left})
    return True


def lock(state_dir: str, owner: Mapping[str, Any], live_pids: Sequence[int], steal: bool) -> None:
    """Take the deployment's lock for ``owner`` ({"controller", "place", "sees_all", "pid", "user", "verb"}).

    ``live_pids``: processes of the owner's controller that are alive. A lock whose command is known to be dead is taken
    over; one of which that cannot be known only with ``steal``, and one that is known to be alive never. Raises UserError
    naming who holds it.
    """
    claim(state_dir)
    folder = Path(state_dir)
    with open(folder / "lock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        holder = peek(state_dir)
        if holder and not _same(holder, owner):
            known = _together(holder, owner) and holder["pid"] in live_pids
            if known or not (steal or dead(holder, owner, live_pids)):
                since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder["since"]))
                who = f"{holder['verb']} of {holder['user']} on {holder['controller']} (pid {holder['pid']}), since {since}"
                hint = "" if known else "; if it is known to be dead, add -e steal_lock=true"
                raise UserError(f"the deployment is being changed by {who}: wait for it{hint}")
        write(folder / "lock.json", json.dumps({**owner, "since": time.time()}) + "\n", 0o600)


def dead(holder: Mapping[str, Any], owner: Mapping[str, Any], live_pids: Sequence[int]) -> bool:
    """Whether the command that holds a lock is known to have ended: ``owner`` would see it among ``live_pids``."""
    visible = owner["sees_all"] or holder["user"] == owner["user"]
    return _together(holder, owner) and visible and holder["pid"] not in live_pids


def peek(state_dir: str) -> Optional[Json]:
    """Return who holds the lock, None when it is free."""
    try:
        return dict(json.loads((Path(state_dir) / "lock.json").read_text()))
    except (OSError, ValueError):
        return None


def unlock(state_dir: str, owner: Mapping[str, Any]) -> None:
    """Give the lock back, if it is ours."""
    holder = peek(state_dir)
    if holder and _same(holder, owner):
        (Path(state_dir) / "lock.json").unlink(missing_ok=True)


def _together(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two commands number processes alike; older checkouts named the controller alone."""
    places = {row["place"] for row in (one, other) if "place" in row}
    return one["controller"] == other["controller"] and len(places) < 2


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return _together(one, other) and one["pid"] == other["pid"]
