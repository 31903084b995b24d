"""Prompt and output lengths, in one spelling everywhere: ``512``, ``256-512``, ``lognormal:512:0.4``, a mixture of them."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pdbench.load.errors import LoadError

#: longest length that is believed to be meant
_MOST = 10_000_000
#: the grammar, for help and for messages
GRAMMAR = (
    "512 (fixed), 256-512 (uniform), normal:512:64 (mean, standard deviation), lognormal:512:0.4 (mean, sigma of the "
    "logarithm), file:lengths.txt (drawn from its lines), or a mixture with weights: 512@0.7,normal:4096:500@0.3"
)
_NUMBER = r"(\d+(?:\.\d+)?)"

_Draw = Callable[[random.Random], float]


@dataclass(frozen=True)
class Lengths:
    """A distribution of whole numbers of tokens, from 1 up.

    ``spelled`` is what `parse` read; ``kinds`` are pairs of a weight and a distribution. Normal and log-normal draws are
    rounded, and what falls below 1 is 1. A log-normal one has the given *mean*: mu = ln(mean) - sigma^2 / 2.
    """

    spelled: str
    kinds: tuple[tuple[float, _Draw], ...]

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read a length as `GRAMMAR` says; raise LoadError for anything else."""
        spelled = text.strip()
        parts = spelled.split(",")
        if len(parts) == 1 and "@" not in spelled:
            return cls(spelled, ((1.0, _kind(spelled)),))
        return cls(spelled, tuple(_weighted(part.strip()) for part in parts))

    def draw(self, rng: random.Random) -> int:
        """Return one length."""
        kind = self.kinds[0][1]
        if len(self.kinds) > 1:
            kind = rng.choices([k for _, k in self.kinds], [w for w, _ in self.kinds])[0]
        return min(_MOST, max(1, round(kind(rng))))

    def __str__(self) -> str:
        """Return the spelling that `parse` reads."""
        return self.spelled


def _weighted(text: str) -> tuple[float, _Draw]:
    body, _, weight = text.rpartition("@")
    if not body or not re.fullmatch(_NUMBER, weight, re.ASCII) or not 0 < float(weight) < math.inf:
        raise LoadError(f"{text!r} is no part of a mixture: write LENGTH@WEIGHT, a weight above 0, such as 512@0.7,4096@0.3")
    return float(weight), _kind(body)


def _kind(text: str) -> _Draw:
    if match := re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", text, re.ASCII):
        low, high = int(match[1]), int(match[2] or match[1])
        if 1 <= low <= high <= _MOST:
            # A fixed length draws, too, so that replacing one by a range leaves the other lengths of a seed as they were.
            return partial(_uniform, low, high)
    elif match := re.fullmatch(rf"(normal|lognormal):{_NUMBER}:{_NUMBER}", text, re.ASCII):
        mean, spread = float(match[2]), float(match[3])
        if match[1] == "normal" and 1 <= mean <= _MOST:
            return partial(_normal, mean, spread)
        if 1 <= mean <= _MOST and spread <= 5:
            mu = math.log(mean) - spread**2 / 2
            return partial(_lognormal, mu, spread)
    elif text.startswith("file:"):
        values = _from_file(Path(text.removeprefix("file:")))
        return partial(_one_of, values)
    raise LoadError(f"{text!r} is no length in tokens, from 1 up; write {GRAMMAR}")


def _uniform(low: int, high: int, rng: random.Random) -> float:
    return rng.randint(low, high)


def _normal(mean: float, deviation: float, rng: random.Random) -> float:
    return rng.gauss(mean, deviation)


def _lognormal(mu: float, sigma: float, rng: random.Random) -> float:
    return rng.lognormvariate(mu, sigma)


def _one_of(values: Sequence[int], rng: random.Random) -> float:
    return rng.choice(values)


def _from_file(path: Path) -> Sequence[int]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as why:
        raise LoadError(f"cannot read lengths from {path}: {getattr(why, 'strerror', None) or 'it is no text'}") from None
    found = []
    for number, line in enumerate(lines, 1):
        word = line.strip()
        if not word:
            continue
        if not re.fullmatch(r"\d+", word, re.ASCII) or not 1 <= int(word) <= _MOST:
            raise LoadError(
                f"{path}, line {number}: {word[:40]!r} is no length; write one whole number of tokens a line, from 1 up"
            )
        found.append(int(word))
    if not found:
        raise LoadError(f"{path} holds no length; write one whole number of tokens a line")
    return found
