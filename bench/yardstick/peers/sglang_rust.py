"""Runs the Rust client of the sglang wheel, without the rest of the wheel."""

from __future__ import annotations

import importlib.util
import site
import sys
from pathlib import Path

LIBRARY = next(so for folder in site.getsitepackages() for so in Path(folder).glob("sglang/srt/rust_extensions/_bench*.so"))

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("_bench", LIBRARY)
    assert spec is not None
    assert spec.loader is not None
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    client.run_argv(["sglang-bench", *sys.argv[1:]])
