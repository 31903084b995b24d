"""What a host's system lacks of what its transfer engine needs."""

from __future__ import annotations

import ctypes
import re
import shutil
from pathlib import Path
from typing import Any, List, Mapping, Sequence


def shows(sign: str, root: Path = Path("/")) -> bool:
    """Whether a sign is seen: ``lib:NAME`` (the dynamic linker finds it), ``file:PATH`` (with ``*``) or ``run:PROGRAM``.

    Packages are not asked for: a library of a vendor's (MLNX_OFED, EFA's installer) does as well.
    """
    kind, _, what = sign.partition(":")
    if kind == "run":
        return shutil.which(what) is not None
    if kind == "file":
        return next(root.glob(what.lstrip("/")), None) is not None
    try:
        ctypes.CDLL(what)
    except OSError:
        return False
    return True


def red_hat(root: Path = Path("/")) -> bool:
    """Whether the host names packages as Red Hat does."""
    try:
        text = (root / "etc/os-release").read_text()
    except OSError:
        return False
    return bool(re.search(r"^ID(?:_LIKE)?=.*\b(?:rhel|fedora|centos|suse)\b", text, re.M))


def missing(rows: Sequence[Mapping[str, Any]], root: Path = Path("/")) -> List[str]:
    """Return the packages, by the host's own names, of which no sign is seen; ``rows``: as :func:`transfer.system` makes them."""
    name = "rpm" if red_hat(root) else "package"
    return list(dict.fromkeys(str(row[name]) for row in rows if not any(shows(sign, root) for sign in row["shows"])))
