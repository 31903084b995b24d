"""Folders in which engines keep kernels that they compile on a host (``cache_dir``): made by a deploy, removed by a purge.

A folder that was there before is used and stays: only those that we made are noted, under the install directory, which a
purge removes last.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import List, Optional

from . import accounts
from .errors import UserError

_MARK = ".pd"
#: What weights are kept in: where an engine downloaded some into its cache, they outlive a purge.
_WEIGHTS = re.compile(r".*\.(safetensors|gguf|pth|pt)|(pytorch_)?model.*\.bin|consolidated.*")


def make(folder: str, install_dir: str, owner: str) -> bool:
    """Make ``folder`` for ``owner`` ("": who deploys) where it is not there, and return whether it was made.

    One of ours that belongs to somebody else (the runtime changed) is given to ``owner`` with all that is in it.
    """
    path = Path(folder)
    try:
        made = not path.is_dir()
        if made:
            note = Path(install_dir) / "caches" / hashlib.sha256(str(path).encode()).hexdigest()[:16]
            note.parent.mkdir(exist_ok=True)
            note.write_text(f"{path}\n")
            path.mkdir(parents=True, exist_ok=True)
            (path / _MARK).write_text("Made by deploy_pd.yml; teardown.yml -e purge=true removes it.\n")
        if owner and (path / _MARK).exists():
            accounts.own_tree(path, owner)
    except OSError as error:
        raise UserError(
            f"cannot make cache_dir={folder}: {error.strerror}; set cache_dir to a folder that may be made, or make it yourself"
        ) from None
    return made


def remove(install_dir: str, check: bool) -> List[str]:
    """Remove the folders that :func:`make` made, and say what was done; those that hold model weights stay."""
    said: List[str] = []
    for note in sorted((Path(install_dir) / "caches").glob("*")):
        path = Path(note.read_text().strip())
        if not (path / _MARK).exists():
            continue
        weights = weights_in(path)
        if weights:
            said.append(f"kept {path}: it holds model weights ({weights.relative_to(path)})")
            continue
        if not check:
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise UserError(f"cannot remove cache_dir {path}: {error.strerror}; remove it yourself") from None
        said.append(f"removed {path}")
    return said


def weights_in(path: Path) -> Optional[Path]:
    """Return a file of model weights (or a folder of the hub's cache) at or below ``path``, None when there is none."""
    if path.name.startswith("models--") or (path.is_file() and _WEIGHTS.fullmatch(path.name)):
        return path
    for folder, folders, names in os.walk(path):
        for name in [*folders, *names]:
            if name.startswith("models--") or (name in names and _WEIGHTS.fullmatch(name)):
                return Path(folder) / name
    return None
