"""The served model's tokenizer, where lengths of text must be tokens; the package `tokenizers` is loaded only then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdbench.load.errors import LoadError
from pdbench.load.prompts import FEWEST_WORDS, WORDS


@dataclass(frozen=True)
class Tokenizer:
    """``encode``: text -> token ids, with what the model wants before a prompt (begin-of-text) where asked for."""

    encode: Callable[[str, bool], Sequence[int]]

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read ``tokenizer.json``, or the one in a model's folder; raise LoadError when it cannot be."""
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise LoadError(f"--tokenizer {path}: there is no {file}; give the model's folder or its tokenizer.json")
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            how = ".venv/bin/python -m pip install -e 'bench[tokenizer]'"
            raise LoadError(f"--tokenizer needs the package tokenizers: {how}") from None
        try:
            fast = Fast.from_file(str(file))
        except Exception as why:  # the package raises nothing narrower
            raise LoadError(f"--tokenizer {file} is not what the package tokenizers reads: {why}") from None
        # What a file says of cutting and padding belongs to training.
        fast.no_truncation()
        fast.no_padding()
        return cls(lambda text, special: fast.encode(text, add_special_tokens=special).ids)

    def count(self, text: str) -> int:
        """Return how many tokens ``text`` is, without special ones."""
        return len(self.encode(text, False))

    @property
    def added(self) -> int:
        """Return how many tokens the model puts before a plain prompt (0 or 1, as a rule)."""
        return len(self.encode("", True))

    def words(self) -> tuple[str, ...]:
        """Return the words of which n joined by blanks are n tokens; raise LoadError when they are too few."""
        good = tuple(w for w in WORDS if [self.count(" ".join([w] * n)) for n in (1, 2, 3)] == [1, 2, 3])
        if len(good) < FEWEST_WORDS or self.count(" ".join(good)) != len(good):
            raise LoadError(
                f"--tokenizer: only {len(good)} of {len(WORDS)} words are one token each in this vocabulary, so text cannot "
                "be made to measure; use --prompt tokens"
            )
        return good
