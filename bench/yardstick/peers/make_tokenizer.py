"""Makes a small byte-level BPE tokenizer, without a network: ``make_tokenizer.py FOLDER HUB_CACHE``.

sglang reads it from the folder. aiperf takes no folder, but a name: for it the same files stand in a cache as the hub's client
lays it out, under the name yard/tok.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast  # type: ignore[import-not-found, unused-ignore]

_COMMIT = "0" * 40


def main(folder: Path, cache: Path) -> None:
    """Train on the standard library's own text, and write both."""
    files = sorted(str(path) for path in Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:150]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train(files, trainers.BpeTrainer(vocab_size=8000, special_tokens=special, initial_alphabet=alphabet))
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=131072, **names)
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(str(folder))
    entry = cache / "hub" / "models--yard--tok"
    (entry / "refs").mkdir(parents=True, exist_ok=True)
    (entry / "refs" / "main").write_text(_COMMIT)
    shutil.copytree(folder, entry / "snapshots" / _COMMIT, dirs_exist_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
