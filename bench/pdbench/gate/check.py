"""What a check hands back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """The verdict of one check.

    ``id`` is stable (docs/validity.md lists them); ``point`` is the load point, None for the whole run; ``message`` says in
    one sentence what was found, good or bad; ``evidence`` holds the figures behind it, JSON values only.
    """

    id: str
    ok: bool
    point: int | None
    message: str
    evidence: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the entry of validity.json."""
        return {"id": self.id, "ok": self.ok, "point": self.point, "message": self.message, "evidence": self.evidence}


def some(items: Iterable[object], most: int = 5) -> str:
    """Return a listing that stays readable: the first ``most`` and how many more there are."""
    names = [str(item) for item in items]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
