"""What modules that take long do in one call, and how long that may take: the caller prints progress between calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Sequence

Json = Dict[str, Any]
#: How long one step may take; the caller prints a progress line between steps.
STEP_S = 6.0


@dataclass
class Outcome:
    """What one step did: ``done`` when nothing is left to do, else ``message`` says what is waited for.

    ``lacks``: what the controller must send before it can go on.
    """

    done: bool = False
    message: str = ""
    changed: List[str] = field(default_factory=list)
    diff: List[Json] = field(default_factory=list)
    lacks: List[str] = field(default_factory=list)


def changed(lines: Sequence[str]) -> bool:
    """Return whether something of what a step says was a change: what it kept was none."""
    return any(not line.startswith("kept ") for line in lines)
