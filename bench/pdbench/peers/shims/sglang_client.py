"""Runs SGLang's Python bench client as the wheel has it, without torch: what the rest of SGLang would import is left out.

It is run by the Python of the virtualenv bench-sglang, which has SGLang's wheel alone and what `sglang.benchmark.serving`
imports. Standing in: the packages' own __init__s, and `datasets`, for data sets that are fetched; random prompts are not.
"""

from __future__ import annotations

import importlib
import site
import sys
import types
from pathlib import Path
from typing import Any

ROOT = next(path for folder in site.getsitepackages() if (path := Path(folder) / "sglang").is_dir())


def package(name: str, **holds: Any) -> None:
    """Stand in for a package's __init__; its own modules are still found."""
    module = types.ModuleType(name)
    module.__path__ = [str(ROOT.joinpath(*name.split(".")[1:]))]
    vars(module).update(holds)
    sys.modules[name] = module


def stand_in() -> None:
    """Put the stand-ins where the client will look."""
    for name in ("sglang", "sglang.srt", "sglang.srt.utils", "sglang.srt.disaggregation"):
        package(name)
    package("sglang.srt.disaggregation.utils", FAKE_BOOTSTRAP_HOST="2.2.2.2")
    package("datasets", load_dataset=None)


if __name__ == "__main__":
    stand_in()
    importlib.import_module("sglang.benchmark.serving").cli_main()
