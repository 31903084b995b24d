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
    """Take the deployment's lock for ``owner`` ({"controller", "pid", "user", "verb"}).

    ``live_pids``: processes of the owner's controller that are alive. A lock of the same controller whose process is
    dead is taken over; one of another controller only with ``steal``. Raises UserError naming who holds it.
    """
    claim(state_dir)
    folder = Path(state_dir)
    with open(folder / "lock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        holder = peek(state_dir)
        if holder and not _same(holder, owner) and not steal:
            elsewhere = holder["controller"] != owner["controller"]
            if elsewhere or holder["pid"] in live_pids:
                since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder["since"]))
                who = f"{holder['verb']} of {holder['user']} on {holder['controller']} (pid {holder['pid']}), since {since}"
                hint = "; if it is known to be dead, add -e steal_lock=true" if elsewhere else ""
                raise UserError(f"the deployment is being changed by {who}: wait for it{hint}")
        write(folder / "lock.json", json.dumps({**owner, "since": time.time()}) + "\n", 0o600)


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


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (one["controller"], one["pid"]) == (other["controller"], other["pid"])
