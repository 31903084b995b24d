"""Prompts of a wanted length that share nothing but what they were told to share.

A prompt is made of pieces (a system prompt, a block of a trace, a turn of a conversation), and a piece of a name: the same
name is the same tokens, another name has others. Where no name is shared no prefix is, and no prefix cache can answer for
the engine.

Names become tokens by SHAKE-128 of seed and name (as many bytes as wanted, the same everywhere and for ever, and a tenth of
the time that seeding numpy's generators takes for short pieces); tokens become bytes by one table look-up each, every token
the same number of bytes. 145 million tokens of a real trace take seconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import shake_128
from typing import TYPE_CHECKING, NamedTuple

from pdbench.load.errors import LoadError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: words of four letters, which are one token each, with a blank before them or without, in the usual BPE vocabularies
_TEXT = (
    "time year ways days life hand part case week work home room area fact book word side kind head line city name team "
    "body back face door form game land note plan road rule step term test town type unit user view wall well wind wine "
    "wood zone able also away base best bill blue born both call camp card care cash cell club code cold come cook cool "
    "copy core cost data date dead deal deep done down draw drop each east easy edge else even ever fair fall farm fast "
    "feel feet fell felt file fill film find fine fire fish five flat flow food foot four free from full fund gain give "
    "goal gold gone good gray grow hair half hall hang hard have heat held help here high hill hold host hour huge inch "
    "into iron join jump keep kept know lake last late lead left less lies like list live load long look lord loss lost "
    "love made mail main make male mark mass"
)
WORDS = tuple(dict.fromkeys(_TEXT.split()))
#: fewest words that prompts are made of: their pairs must tell prompts apart
FEWEST_WORDS = 32


class Piece(NamedTuple):
    """A part of a prompt: ``tokens`` tokens that ``name`` alone decides.

    ``role``: who says it in a chat. ``serial``: the request whose own text begins with it, -1 for none: such beginnings
    differ in their first token. ``answer``: the request whose answer stands here, -1 for none: where a prompt is text it is
    what the server really said, where it is token ids it is made up like any other piece.
    """

    name: str
    tokens: int
    role: str = "user"
    serial: int = -1
    answer: int = -1


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
        if not match or not 2 <= int(match[2]) - int(match[1]) < 2**31:
            raise LoadError(f"{text!r} is no range of token ids; write LOW-HIGH with at least 2 ids, such as 300-3800")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Prompts:
    """A source of prompts: the same seed gives the same tokens for the same name.

    ``serial`` counts the prompts of a run. The first token (of text: the first two words) counts up through the ids from
    one prompt to the next: two prompts can agree in it only when they are as many prompts apart as there are ids (pairs of
    words), so caches with a page of one token find nothing either. ``words`` have four letters each; ``added``: tokens that
    the model puts before plain text, which are part of a prompt's length.
    """

    seed: int
    ids: TokenRange = TokenRange()
    words: Sequence[str] = WORDS
    added: int = 0

    def tokens(self, name: str, serial: int | None, length: int) -> list[int]:
        """Return ``length`` token ids; ``serial`` None: nothing is special about the first."""
        return [self.ids.low + int(place) for place in self._id_places(name, serial, length)]

    def text(self, name: str, serial: int | None, length: int) -> str:
        """Return ``length`` words."""
        return self.raw_text(name, serial, length)[:-1].decode()

    def raw_tokens(self, name: str, serial: int | None, length: int) -> bytes:
        """Return ``length`` token ids as JSON has them in a list, each followed by a comma."""
        return self._id_bytes.take(self._id_places(name, serial, length)).tobytes()

    def raw_text(self, name: str, serial: int | None, length: int) -> bytes:
        """Return ``length`` words, each followed by a blank; none needs escaping in JSON."""
        places = self._places(name, length, len(self.words))
        if serial is not None and length:
            more, first = divmod(self._first_word[0] + serial, len(self.words))
            places[0] = first
            places[1:2] = (self._first_word[1] + more) % len(self.words)
        return self._word_bytes.take(places).tobytes()

    def _id_places(self, name: str, serial: int | None, length: int) -> NDArray[np.int64]:
        span = self.ids.high - self.ids.low
        places = self._places(name, length, span)
        if serial is not None and length:
            places[0] = (self._first_id + serial) % span
        return places

    def _places(self, name: str, length: int, span: int) -> NDArray[np.int64]:
        """Return ``length`` numbers below ``span``; fewer of them are the beginning of more."""
        import numpy as np

        raw = np.frombuffer(shake_128(f"{self.seed}/{name}".encode()).digest(4 * length), dtype="<u4")
        # 32 random bits times the span, shifted down: even to 1 in 2^32 / span, and without a division.
        return (raw.astype(np.int64) * span) >> 32

    @cached_property
    def _first_id(self) -> int:
        return int(self._places("first", 1, self.ids.high - self.ids.low)[0])

    @cached_property
    def _first_word(self) -> tuple[int, int]:
        one, two = self._places("first", 2, len(self.words))
        return int(one), int(two)

    @cached_property
    def _id_bytes(self) -> NDArray[np.bytes_]:
        import numpy as np

        # JSON allows blanks before a number, so that short ids take as many bytes as long ones.
        width = len(str(self.ids.high - 1))
        return np.array([b"%*d," % (width, i) for i in range(self.ids.low, self.ids.high)])

    @cached_property
    def _word_bytes(self) -> NDArray[np.bytes_]:
        import numpy as np

        return np.array([f"{word} ".encode() for word in self.words])
