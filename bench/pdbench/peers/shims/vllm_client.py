"""Runs vLLM's `vllm bench serve` as the wheel has it, without torch: what the rest of vLLM would import is left out.

It is run by the Python of the virtualenv bench-vllm, which has vLLM's wheel alone and what `vllm.benchmarks.serve` imports.
Standing in: the packages' own __init__s, images, audio, LoRA and Mistral's tokenizers, which the random prompts of
`pdbench.peers.commands` do not touch; `get_tokenizer` is transformers' AutoTokenizer, which vLLM's own calls, too.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import site
import sys
import types
from pathlib import Path
from typing import Any

ROOT = next(path for folder in site.getsitepackages() if (path := Path(folder) / "vllm").is_dir())


class _Logger(logging.Logger):
    info_once, warning_once, debug_once = logging.Logger.info, logging.Logger.warning, logging.Logger.debug


class _Absent:
    """Stands for a name that nothing here uses."""


def package(name: str, **holds: Any) -> None:
    """Stand in for a package's __init__; its own modules are still found."""
    module = types.ModuleType(name)
    module.__path__ = [str(ROOT.joinpath(*name.split(".")[1:]))]
    vars(module).update(holds)
    sys.modules[name] = module


def tokenizer(name: str, *_: Any, **__: Any) -> Any:
    """Return the tokenizer of a folder."""
    return importlib.import_module("transformers").AutoTokenizer.from_pretrained(name)


def stand_in() -> None:
    """Put the stand-ins where the client will look."""
    for name in ("vllm", "vllm.utils", "vllm.lora", "vllm.multimodal", "vllm.transformers_utils"):
        package(name)
    package("vllm.tokenizers", TokenizerLike=_Absent, get_tokenizer=tokenizer)
    package("vllm.inputs", MultiModalDataDict=_Absent)
    package("vllm.logger", init_logger=_Logger)
    package("vllm.lora.request", LoRARequest=_Absent)
    package("vllm.lora.utils", get_adapter_absolute_path=_Absent)
    package("vllm.multimodal.audio", get_audio_duration=_Absent)
    package("vllm.multimodal.image", convert_image_mode=_Absent)
    package("vllm.multimodal.utils", encode_image_url=_Absent, fetch_image=_Absent)
    package("vllm.transformers_utils.repo_utils", hf_api=_Absent)
    package("vllm.utils.mistral", is_mistral_tokenizer=lambda _: False)
    package("vllm.utils.network_utils", join_host_port=_Absent)


if __name__ == "__main__":
    stand_in()
    serve = importlib.import_module("vllm.benchmarks.serve")
    flags = argparse.ArgumentParser(prog="vllm bench serve")
    serve.add_cli_args(flags)
    serve.main(flags.parse_args())
