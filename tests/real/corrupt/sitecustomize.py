"""Makes real SGLang send a wrong KV cache, for tests only: this folder on PYTHONPATH in place of shim/, PD_TEST_CORRUPT_KV set.

Transfers then succeed, with as many bytes as ever, and every answer is 200 and of the right length; only the contents are wrong.
`page`: of every prompt, the page in the middle is sent again from the one before it (a wrong index in a page table).
`all`: every page holds the prompt's first page. Prompts of a single page arrive as they are.

Everything in shim/ is in force as well.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_FOLDER = Path(__file__).resolve().parents[1] / "shim"
_MODE = os.environ.get("PD_TEST_CORRUPT_KV")
_SENDERS = {
    "sglang.srt.disaggregation.mooncake.conn": "MooncakeKVSender",
    "sglang.srt.disaggregation.nixl.conn": "NixlKVSender",
}


def _shim() -> ModuleType:
    sys.path.append(str(_FOLDER))
    spec = importlib.util.spec_from_file_location("pd_test_shim", _FOLDER / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrong(pages: Any, mode: str) -> Any:
    """Return the page indices (int32, one a page of the prompt, in order) that are sent instead."""
    pages = np.array(pages)
    if mode == "page":
        middle = len(pages) // 2
        pages[middle] = pages[max(0, middle - 1)]
    elif mode == "all":
        pages[:] = pages[0]
    else:
        raise ValueError(f"PD_TEST_CORRUPT_KV={mode}: page or all")
    return pages


def _spoil(module: ModuleType, mode: str) -> None:
    sender = getattr(module, _SENDERS[module.__name__])
    send = sender.send

    def send_wrong_pages(self: Any, kv_indices: Any, *args: Any, **kwargs: Any) -> Any:
        return send(self, wrong(kv_indices, mode) if len(kv_indices) else kv_indices, *args, **kwargs)

    sender.send = send_wrong_pages


def _and_spoil(patches: dict[str, Any], name: str, mode: str) -> None:
    earlier = patches.get(name)

    def patch(module: ModuleType) -> None:
        if earlier:
            earlier(module)
        _spoil(module, mode)

    patches[name] = patch


_patches = _shim().AFTER_IMPORT
if _MODE:
    for _name in _SENDERS:
        _and_spoil(_patches, _name, _MODE)
