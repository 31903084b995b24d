"""Makes a tiny Qwen2 model folder: random weights, and a tokenizer trained here. Nothing is downloaded.

    python make_tiny_model.py DIR [--seed N]

The same seed gives the same bytes. The weights are real (safetensors, bfloat16) and of a size at which the next token
depends on all of the context: with an engine's own dummy weights attention adds almost nothing, and a server which got a
wrong KV cache would still give the right answer.

It needs numpy and tokenizers, which the engine's virtualenv has.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

VOCABULARY = 4096
LAYERS = 2
HEADS = 4
KV_HEADS = 2
HEAD_SIZE = 32
HIDDEN = HEADS * HEAD_SIZE
INTERMEDIATE = 256
CONTEXT = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

#: Bytes of KV cache per token: keys and values, every layer, bfloat16.
KV_BYTES_PER_TOKEN = 2 * LAYERS * KV_HEADS * HEAD_SIZE * 2

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "use_cache": True,
    "use_sliding_window": False,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, as Hugging Face names it."""
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        tensors |= {
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}post_attention_layernorm.weight": (HIDDEN,),
            f"{at}self_attn.q_proj.weight": (HEADS * HEAD_SIZE, HIDDEN),
            f"{at}self_attn.q_proj.bias": (HEADS * HEAD_SIZE,),
            f"{at}self_attn.k_proj.weight": (KV_HEADS * HEAD_SIZE, HIDDEN),
            f"{at}self_attn.k_proj.bias": (KV_HEADS * HEAD_SIZE,),
            f"{at}self_attn.v_proj.weight": (KV_HEADS * HEAD_SIZE, HIDDEN),
            f"{at}self_attn.v_proj.bias": (KV_HEADS * HEAD_SIZE,),
            f"{at}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_SIZE),
            f"{at}mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{at}mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{at}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    return tensors


def weights(seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Norms of one, biases of zero, and normal matrices of standard deviation 0.2."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for name, shape in shapes().items():
        if name.endswith("norm.weight"):
            tensors[name] = np.ones(shape, dtype=np.float32)
        elif name.endswith("bias"):
            tensors[name] = np.zeros(shape, dtype=np.float32)
        else:
            tensors[name] = rng.normal(0.0, 0.2, shape).astype(np.float32)
    return tensors


def as_bfloat16(values: npt.NDArray[np.float32]) -> bytes:
    """The upper half of each float32, which is what a bfloat16 is (truncated, not rounded)."""
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def write_safetensors(path: Path, tensors: dict[str, npt.NDArray[np.float32]]) -> None:
    """Write the safetensors layout: length of the header, header in JSON, then the bytes of every tensor in turn."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name, values in tensors.items():
        blob = as_bfloat16(values)
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(blobs)


def write_tokenizer(path: Path, seed: int) -> None:
    """Train byte-level BPE on sentences of made-up words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(seed)
    syllables = ["ka", "lo", "mi", "ren", "tu", "sha", "pe", "dor", "ix", "vun", "gal", "sto", "bri", "en", "ough"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(6000)]
    corpus = [" ".join(rng.choices(words, k=20)) + ". user assistant system 0123456789\n" for _ in range(3000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.save(str(path))


def make(folder: Path, seed: int) -> None:
    """Write the model to `folder`, which is made if it is missing. config.json comes last: with it the model is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer.json", seed)
    write_safetensors(folder / "model.safetensors", weights(seed))
    documents: dict[str, dict[str, object]] = {
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 2},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": CONTEXT,
            "chat_template": CHAT_TEMPLATE,
        },
        "config.json": CONFIG,
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=1) + "\n")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make a tiny random Qwen2 model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        make(options.folder, options.seed)
    except (ImportError, OSError) as error:
        print(f"make_tiny_model: {error}", file=sys.stderr)
        return 1
    print(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
