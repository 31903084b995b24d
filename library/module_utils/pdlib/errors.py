"""The one exception that reaches a user, and the words "did you mean"."""

from __future__ import annotations

import difflib
from typing import Iterable, Optional


class UserError(Exception):
    """Something the user wrote cannot be done; the message says what, where it was set, and what would be right."""


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> Optional[str]:
    """Return the known word most like ``word``, or None when nothing is close (``cutoff`` as in difflib, 0 to 1)."""
    hits = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return hits[0] if hits else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean X?``, or the empty string when nothing known is close."""
    hit = nearest(word, known)
    return f"; did you mean {hit}?" if hit else ""


def listing(names: Iterable[str]) -> str:
    """Return names as a person lists them: ``a``, ``a and b``, ``a, b and c``."""
    items = list(names)
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"
