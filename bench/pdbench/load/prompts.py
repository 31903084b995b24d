"""Prompts of a wanted length that share no prefix, so that no prefix cache can answer for the engine."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from pdbench.load.errors import LoadError

#: words that are one token each, with the blank before them, in the usual BPE vocabularies
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education foot boy age policy music market sense death plan interest "
    "experience effect use class control field development role effort rate heart drug show leader light voice wife "
    "police mind price report decision son view relationship town road arm difference value building action season "
    "society tax director position player record paper space ground form event official matter center couple site "
    "project base activity star table need court oil situation cost industry figure street image phone data picture "
    "practice piece land product doctor wall worker news test movie north love support technology step baby computer "
    "type attention film tree source organization hair look century evidence window culture chance brother energy"
)
_WORDS = tuple(dict.fromkeys(_TEXT.split()))


@dataclass(frozen=True)
class TokenRange:
    """Token ids that prompts are made of: ``low`` to ``high - 1``.

    The default keeps clear of special tokens, which sit at either end of a vocabulary, and fits one of 4096.
    """

    low: int = 300
    high: int = 3800

    @classmethod
    def parse(cls, text: str) -> TokenRange:
        """Read ``300-3800``; raise LoadError for anything else or for fewer than 2 ids."""
        match = re.fullmatch(r"(\d+)-(\d+)", text.strip(), re.ASCII)
        if not match or int(match[2]) - int(match[1]) < 2:
            raise LoadError(f"{text!r} is no range of token ids; write LOW-HIGH with at least 2 ids, such as 300-3800")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Prompts:
    """A source of prompts: the same seed gives the same prompts in the same order.

    A prompt is named by its load point, its phase and its index; each is drawn from a generator of its own. The first
    token counts up through the ids from one prompt of a run to the next: two prompts can agree in their first token
    only when they are as many prompts apart as there are ids, so caches with a page of one token find nothing either.
    """

    seed: int
    ids: TokenRange = TokenRange()

    def tokens(self, name: str, serial: int, length: int) -> list[int]:
        """Return ``length`` token ids; ``serial`` counts the prompts of the run, ``name`` picks the generator."""
        rng = random.Random(f"{self.seed}/{name}")
        span = self.ids.high - self.ids.low
        start = random.Random(f"{self.seed}/first").randrange(span)
        first = self.ids.low + (start + serial) % span
        return [first, *rng.choices(range(self.ids.low, self.ids.high), k=length - 1)]

    def text(self, name: str, serial: int, length: int) -> str:
        """Return ``length`` words; the first two count up through all pairs of words as the first token id does."""
        rng = random.Random(f"{self.seed}/{name}")
        start = random.Random(f"{self.seed}/first").randrange(len(_WORDS) ** 2)
        second, first = divmod(start + serial, len(_WORDS))
        words = [_WORDS[first], _WORDS[second % len(_WORDS)], *rng.choices(_WORDS, k=max(0, length - 2))]
        return " ".join(words[:length])
