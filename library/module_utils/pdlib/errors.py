"""The one exception that reaches a user, and the words "did you mean"."""

from __future__ import annotations

import difflib
import re
from typing import Iterable, Optional

#: a word that nobody reads to its end; lists of hosts have commas
_LONG_WORD = re.compile(r"[^\s,]{1000,}")


class UserError(Exception):
    """Something the user wrote cannot be done; the message says what, where it was set, and what would be right."""

    def __init__(self, message: str):
        shown = _LONG_WORD.sub(lambda found: f"{found[0][:80]}... ({len(found[0])} characters)", message)
        # Half a surrogate pair can stand in JSON and in Python, but in no terminal.
        super().__init__(shown.encode("utf-8", "replace").decode())


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
