"""The unprivileged account that services and load generators run as on systemd hosts."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import subprocess
from pathlib import Path
from typing import List, Sequence

from .errors import UserError

#: Stands in the account's comment, so that teardown knows which account is ours to remove.
MARK = "LLM serving by deploy_pd.yml"
#: What GPUs and RDMA devices are open to, where a host has these groups.
_GROUPS = ("video", "render", "rdma")
#: Downloaded models in the account's home, which outlive a purge.
_WEIGHTS = (".cache/huggingface", ".cache/modelscope")


def home_of(name: str) -> str:
    """Return the home that an account of ours gets; not below /home, which may be another machine's."""
    return f"/var/lib/{name}-home"


def exists(name: str) -> bool:
    """Whether the host has the account."""
    try:
        pwd.getpwnam(name)
        return True
    except KeyError:
        return False


def ensure(name: str) -> bool:
    """Make the account where it does not exist; return whether it was made. One that exists is left as it is."""
    if exists(name):
        return False
    known = {entry.gr_name for entry in grp.getgrall()}
    command = ["useradd", "--system", "--create-home", "--home-dir", home_of(name), "--shell", "/usr/sbin/nologin"]
    command += ["-g", name] if name in known else ["--user-group"]
    groups = [group for group in _GROUPS if group in known]
    _run([*command, *(["--groups", ",".join(groups)] if groups else []), "--comment", MARK, name])
    os.chmod(home_of(name), 0o700)
    return True


def ours() -> List[str]:
    """Return the accounts that deploy_pd.yml made on this host."""
    return sorted(entry.pw_name for entry in pwd.getpwall() if entry.pw_gecos.split(",")[0] == MARK)


def remove(name: str) -> str:
    """Remove an account of ours and its caches, and say what was done; with models in its home both stay but for the caches."""
    home = Path(pwd.getpwnam(name).pw_dir)
    weights = [path for path in (home / kept for kept in _WEIGHTS) if path.exists()]
    if weights and home == Path(home_of(name)):
        for path in [*home.iterdir(), *(home / ".cache").iterdir()]:
            if not any(path == kept or path in kept.parents for kept in weights):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return f"kept user {name}: {', '.join(str(path) for path in weights)} may hold model weights"
    _run(["userdel", name])
    if home == Path(home_of(name)):
        shutil.rmtree(home, ignore_errors=True)
    return f"removed user {name}"


def leftovers(name: str, folders: Sequence[str] = ("/tmp", "/var/tmp", "/dev/shm"), proc: str = "/proc") -> List[Path]:
    """Return what the account's ended processes left where everybody may write; nothing while one of them runs.

    Engines do not clear their sockets and shared memory away.
    """
    uid = pwd.getpwnam(name).pw_uid
    for process in Path(proc).glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == uid:
                return []
    found = []
    for path in (path for folder in map(Path, folders) if folder.is_dir() for path in folder.iterdir()):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == uid:
                found.append(path)
    return sorted(found)


def group_of(name: str) -> int:
    """Return the account's own group."""
    return pwd.getpwnam(name).pw_gid


def own(path: Path, name: str) -> None:
    """Give a file or folder (not what is in it) to the account, where it is not its own yet."""
    entry = pwd.getpwnam(name)
    if path.stat().st_uid != entry.pw_uid:
        os.chown(path, entry.pw_uid, entry.pw_gid)


def own_tree(path: Path, name: str) -> None:
    """Give a folder with all that is in it to the account, where the folder is not its own yet."""
    entry = pwd.getpwnam(name)
    if path.stat().st_uid == entry.pw_uid:
        return
    for folder, _, files in os.walk(path, topdown=False):
        for file in files:
            os.chown(os.path.join(folder, file), entry.pw_uid, entry.pw_gid, follow_symlinks=False)
        # The top comes last: where this is cut short, the next deploy does it again.
        os.chown(folder, entry.pw_uid, entry.pw_gid)


def _run(command: List[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(
            f"{command[0]}: {error.strerror}; make the user yourself, or set service_user to one that exists"
        ) from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise UserError(f"{' '.join(command)}: {said}; make the user yourself, or set service_user to one that exists")
