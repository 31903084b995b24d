"""Folders of ours on a host: they have a marker, without which nothing is written there or removed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
from pathlib import Path
from typing import List, Mapping

from .errors import UserError, listing

#: File of a state directory with its deployment's name.
_DEPLOYMENT = "deployment"
#: Folder of an install directory in which those who use it stand: hosts of a deployment may share one, and so may deployments.
_USERS = "users"


def claim(folder: str, shared: bool = False) -> bool:
    """Make ``folder`` ours (marked), refusing one that holds somebody else's files; return whether it was new.

    It is closed to other users; with ``shared``, those who know a path in it may reach it (an unprivileged service does).
    """
    path, mode = Path(folder), 0o711 if shared else 0o700
    marker = path / ".pd"
    try:
        if marker.exists():
            if shared and path.stat().st_mode & 0o777 == 0o700:
                path.chmod(mode)
            return False
        if path.exists() and any(path.iterdir()):
            # Hosts of the inventory may share the folder: another one may have marked it since.
            if marker.exists():
                return False
            raise UserError(f"{folder} exists and holds files that are not ours: set another state_dir or install_dir")
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        path.chmod(mode)
        marker.write_text("Made by deploy_pd.yml; teardown.yml removes it.\n")
    except OSError as error:
        raise UserError(
            f"cannot make {folder}: {error.strerror}; set state_dir and install_dir to folders you may write, or become root"
        ) from None
    return True


def deployment(state_dir: str) -> str:
    """Return whose deployment a state directory belongs to, by its router's; "" where nobody has said."""
    try:
        return (Path(state_dir) / _DEPLOYMENT).read_text().strip()
    except OSError:
        return ""


def named(state_dir: str) -> str:
    """Return what names a deployment, whoever drives it: the router's host and ``state_dir`` there, as they were at first."""
    # Where a plan is kept, it is the router's.
    return (deployment(state_dir) if (Path(state_dir) / "plan.json").exists() else "") or _user(state_dir)


def refuse_others(owners: Mapping[str, str], wanted: str) -> None:
    """Raise UserError for hosts (host, "" for this one -> :func:`deployment`) of others than ``wanted`` ("": whosever they are)."""
    others = [host for host, owner in owners.items() if wanted and owner not in ("", wanted)]
    if others:
        whose = listing(sorted({owners[host] for host in others}))
        where = f"state_dir of {listing(others)}" if all(others) else "this state_dir"
        raise UserError(
            f"{where} belongs to the deployment whose router has {whose}, and this one's has {wanted}: set another state_dir; or, if that "
            f"one's router has moved, or it is no more: teardown.yml -l {','.join(others) or 'HOST'} -e steal_lock=true"
        )


def enroll(state_dir: str, wanted: str) -> None:
    """Note that ``state_dir``, where it is there, belongs to the deployment ``wanted`` ("": nobody says)."""
    path = Path(state_dir)
    if wanted and (path / ".pd").exists() and not deployment(state_dir):
        (path / _DEPLOYMENT).write_text(f"{wanted}\n")


def use(install_dir: str, state_dir: str) -> None:
    """Note in ``install_dir``, where it is there, that the deployment with ``state_dir`` on this host uses it."""
    note = _note(install_dir, state_dir)
    if (Path(install_dir) / ".pd").exists() and not note.exists():
        # A host that is given it read-only cannot purge it, either.
        with contextlib.suppress(OSError):
            note.parent.mkdir(exist_ok=True)
            note.write_text(_user(state_dir) + "\n")


def leave(install_dir: str, state_dir: str) -> None:
    """Take the note of :func:`use` away."""
    with contextlib.suppress(OSError):
        _note(install_dir, state_dir).unlink()


def users(install_dir: str, state_dir: str) -> List[str]:
    """Return who else uses ``install_dir``; one of this host whose state directory is gone does not."""
    others = []
    for note in sorted((Path(install_dir) / _USERS).glob("*")):
        # Hosts that share the folder may leave it at this moment.
        with contextlib.suppress(FileNotFoundError):
            user = note.read_text().strip()
            folder, _, host = user.rpartition(" on ")
            if user != _user(state_dir) and (host != socket.gethostname() or Path(folder).exists()):
                others.append(user)
    return sorted(others)


def _user(state_dir: str) -> str:
    return f"{Path(state_dir)} on {socket.gethostname()}"


def _note(install_dir: str, state_dir: str) -> Path:
    return Path(install_dir) / _USERS / hashlib.sha256(_user(state_dir).encode()).hexdigest()[:16]


def remove(folder: Path) -> None:
    """Take a folder of ours away; raise UserError for one that is not marked."""
    marker = folder / ".pd"
    if not marker.exists():
        raise UserError(f"{folder} has no file .pd, so it is not one that deploy_pd.yml made: remove it yourself if it should go")
    # Hosts of the inventory may share the folder and get here together: the first takes it away, the others find it gone.
    gone = folder.with_name(f".{folder.name}.gone-{os.getpid()}")
    try:
        folder.rename(gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone)
