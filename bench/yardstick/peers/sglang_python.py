"""Runs sglang's Python bench client as the wheel has it, without torch: only what its packages would import is left out."""

from __future__ import annotations

import importlib
import site
import sys
import types
from pathlib import Path

ROOT = next(path for folder in site.getsitepackages() if (path := Path(folder) / "sglang").is_dir())


def package(name: str, *, inside: str = "") -> types.ModuleType:
    """Stand in for a package's __init__; with ``inside`` its own modules are still found."""
    module = types.ModuleType(name)
    if inside:
        module.__path__ = [str(ROOT / inside)]
    sys.modules[name] = module
    return module


package("sglang", inside=".")
package("sglang.srt", inside="srt")
package("sglang.srt.utils", inside="srt/utils")
package("sglang.srt.disaggregation", inside="srt/disaggregation")
vars(package("sglang.srt.disaggregation.utils"))["FAKE_BOOTSTRAP_HOST"] = "2.2.2.2"

if __name__ == "__main__":
    importlib.import_module("sglang.benchmark.serving").cli_main()
