"""The checkout whose plays a sweep drives, and its `pdlib`: what plans there plans here."""

from __future__ import annotations

import sys
from pathlib import Path

#: `make setup` installs pdbench from the checkout itself, so the plays are beside it.
ROOT = Path(__file__).resolve().parents[3]


def has_plays() -> bool:
    """Whether this pdbench lies in a checkout; one that was installed from a wheel has no plays to drive."""
    return (ROOT / "bench.yml").is_file() and (ROOT / "library" / "module_utils" / "pdlib").is_dir()


if has_plays() and str(ROOT / "library" / "module_utils") not in sys.path:
    sys.path.insert(0, str(ROOT / "library" / "module_utils"))
