"""Prompt and output lengths: fixed (``512``) or uniform (``256-512``)."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from pdbench.load.errors import LoadError


@dataclass(frozen=True)
class Lengths:
    """Whole numbers of tokens drawn uniformly from ``low`` to ``high``, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read ``512`` or ``256-512``; raise LoadError for anything else, 0 included."""
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip(), re.ASCII)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high:
            raise LoadError(f"{text!r} is no length: write a number of tokens (512) or a range (256-512), from 1 up")
        return cls(low, high)

    def draw(self, rng: random.Random) -> int:
        """Return one length."""
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        """Return the spelling that `parse` reads."""
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"
