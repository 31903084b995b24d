"""Stand-ins for a tokenizer and a language model: deterministic, documented, and the same in every process.

Tokenizer: a word of up to 16 characters between white space is one token, a longer one is cut every 16 characters.
So a text of N short words has N tokens. A chat is the words of its messages' contents; no template tokens are added.

Language model: output token i is a function of the whole prompt and of i. Every token is one word with a leading
space, hence an output of N tokens, sent back as a prompt, has N tokens again. There is no end-of-text token: a
request always gets as many tokens as it allows.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdbench.model.radix import pack

VOCABULARY_SIZE = 4096
_MAX_ID = 2**31 - 1
_WORD = re.compile(r"\S{1,16}")
_SYLLABLES = [consonant + vowel for consonant in "bdfgjklmnprstvwz" for vowel in "aeio"]
_WORDS = [f" {first}{second}" for first in _SYLLABLES for second in _SYLLABLES]
#: All output words have so many characters, which are ASCII and need no escaping in JSON.
WORD_LENGTH = 5
#: The words of all output tokens, as the bytes that go over the wire.
WORD_BYTES = [text.encode() for text in _WORDS]
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Prompt:
    """A prompt as the emulator keeps it: its length in tokens, the SHA-256 of its token ids, and for a prefix cache the ids."""

    tokens: int
    digest: bytes
    packed: bytes = field(default=b"", compare=False, repr=False)


def encode(text: str) -> list[int]:
    """Return the token ids of a text."""
    return [zlib.crc32(word.encode("utf-8", "surrogatepass")) & _MAX_ID for word in _WORD.findall(text)]


def prompt_of(ids: Sequence[int]) -> Prompt:
    """Return what is kept of a prompt. Raises ValueError when an id is not between 0 and 2^31 - 1."""
    try:
        packed = array("q", ids)
    except (TypeError, OverflowError):
        raise ValueError("token ids must be whole numbers") from None
    if packed and not (min(packed) >= 0 and max(packed) <= _MAX_ID):
        raise ValueError(f"token ids must be between 0 and {_MAX_ID}")
    return Prompt(len(packed), hashlib.sha256(packed.tobytes()).digest(), pack(packed))


class Output:
    """The endless answer to one prompt, made from the digest that the KV cache carries."""

    def __init__(self, digest: bytes) -> None:
        """Take the digest from the KV message, not from the request: wrong KV then gives wrong text."""
        self._seed = int.from_bytes(digest[:8], "big")

    def token(self, index: int) -> int:
        """Return the id of output token `index`, from 0: SplitMix64 of (digest, index)."""
        mixed = (self._seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        return (mixed ^ (mixed >> 31)) % VOCABULARY_SIZE


def word(token: int) -> str:
    """Return the text of one output token."""
    return _WORDS[token]
