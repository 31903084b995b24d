"""A folder that transformers reads a tokenizer from: the served model's, or one of words where no model is served.

The peers make their prompts with it: random token ids, decoded to text.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

_UNKNOWN = "<unk>"
#: 40 syllables: words of three of them are 64,000, so that prompts of random ids rarely begin alike
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmn" for vowel in "aeiou"]


def make(folder: Path, given: Path | None) -> None:
    """Write the tokenizer folder; ``given``: the served model's tokenizer.json, None for an emulated engine. Raises OSError.

    The emulator takes a word for a token (`pdbench.emulate.text`); so does this tokenizer, and lengths are exact there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if given is not None:
        shutil.copyfile(given, folder / "tokenizer.json")
    else:
        (folder / "tokenizer.json").write_text(json.dumps(_of_words()), encoding="utf-8")
    # Without the model's own config transformers must be told what to make of the file.
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n', encoding="utf-8")


def _of_words() -> dict[str, object]:
    words = ["".join(parts) for parts in itertools.product(_SYLLABLES, repeat=3)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate([_UNKNOWN, *words])}, "unk_token": _UNKNOWN},
    }
