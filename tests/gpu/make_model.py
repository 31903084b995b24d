"""Real weights for a Qwen2 configuration, made on the GPU: random, and of a size at which the whole context matters.

    python make_model.py CONFIG_DIR DIR [--seed N]

With an engine's own dummy weights attention adds almost nothing, and a decode worker with a wrong KV cache would still
give the right answer. Here attention is about as strong as the rest (docs/results/h200-first.md has the control that shows it).
CONFIG_DIR has config.json and the tokenizer; DIR gets these and the weights (safetensors, bfloat16).
It runs with the engine's Python: torch and safetensors are all that it needs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Standard deviations by the end of a tensor's name. Matrices of the MLP add up over five times as many terms.
SIZES = {
    "embed_tokens.weight": 0.1,
    "lm_head.weight": 0.1,
    "gate_proj.weight": 0.04,
    "up_proj.weight": 0.04,
    "down_proj.weight": 0.04,
}
OTHERS = 0.07
#: Tensors of one file at most: the writer holds them in memory.
LAYERS_A_FILE = 12


def shapes(config: dict[str, Any]) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Yield (number of the file, name, shape) of every tensor, as Hugging Face names it."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    kv = config["num_key_value_heads"] * size
    yield 0, "model.embed_tokens.weight", (config["vocab_size"], hidden)
    if not config["tie_word_embeddings"]:
        yield 0, "lm_head.weight", (config["vocab_size"], hidden)
    yield 0, "model.norm.weight", (hidden,)
    for layer in range(config["num_hidden_layers"]):
        at, file = f"model.layers.{layer}.", 1 + layer // LAYERS_A_FILE
        for name, rows in (("q", heads * size), ("k", kv), ("v", kv)):
            yield file, f"{at}self_attn.{name}_proj.weight", (rows, hidden)
            yield file, f"{at}self_attn.{name}_proj.bias", (rows,)
        yield file, f"{at}self_attn.o_proj.weight", (hidden, heads * size)
        yield file, f"{at}mlp.gate_proj.weight", (inner, hidden)
        yield file, f"{at}mlp.up_proj.weight", (inner, hidden)
        yield file, f"{at}mlp.down_proj.weight", (hidden, inner)
        yield file, f"{at}input_layernorm.weight", (hidden,)
        yield file, f"{at}post_attention_layernorm.weight", (hidden,)


def deviation(name: str) -> float:
    """Return a matrix's standard deviation."""
    return next((size for end, size in SIZES.items() if name.endswith(end)), OTHERS)


def make(source: Path, folder: Path, seed: int) -> int:
    """Write the model to ``folder``; return the bytes of its weights. The index comes last: with it the model is whole."""
    import torch
    from safetensors.torch import save_file  # type: ignore[import-not-found, unused-ignore]

    config = json.loads((source / "config.json").read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix == ".json":
            shutil.copy(path, folder / path.name)
    where: dict[str, str] = {}
    files: dict[int, dict[str, Any]] = {}
    total = 0
    for file, name, shape in shapes(config):
        if len(shape) == 1:
            made = (torch.ones if name.endswith("norm.weight") else torch.zeros)(shape, dtype=torch.bfloat16)
        else:
            made = (torch.randn(shape, generator=generator, device=device) * deviation(name)).to(torch.bfloat16).cpu()
        files.setdefault(file, {})[name] = made
        where[name] = f"model-{file}.safetensors"
        total += made.numel() * 2
    for file, tensors in files.items():
        save_file(tensors, folder / f"model-{file}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")
    return total


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Random weights for a Qwen2 configuration.")
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    try:
        total = make(given.source, given.folder, given.seed)
    except (ImportError, OSError, KeyError) as error:
        print(f"make_model: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{given.folder}: {total / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
