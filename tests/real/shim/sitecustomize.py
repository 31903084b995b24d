"""Lets the real SGLang 0.5.23 run on a CPU: put this folder on PYTHONPATH. For tests only.

It changes what runs, in the four places where the engine, as published, takes a GPU for granted:

1. torchvision on PyPI is a CUDA build. Beside a CPU torch its operators do not load, and the import dies on
   "operator torchvision::nms does not exist". The operators' schemas are declared first; nobody calls them.
2. The CPU build of sgl-kernel is not on PyPI: sgl_kernel/ in this folder stands in for it.
3. Mooncake's sender stages page indices in pinned memory behind a CUDA event, whatever --device says
   (disaggregation/prefill.py, send_kv_chunk). Its flag is turned off, which takes the plain path.
4. The NIXL backend registers the KV pool as VRAM. On a CPU it is host memory, and UCX refuses: it is named DRAM.

The names patched are private to the versions in requirements/engine-sglang-cpu*.in.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def declare_torchvision_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # torch removes what a library declared as soon as the library is collected
    torch.library._pd_torchvision = library


def send_page_indices_from_host(module: ModuleType) -> None:
    module.MooncakeKVSender.supports_host_tensor_indices = False


def register_kv_as_host_memory(module: ModuleType) -> None:
    agent = module.nixl_agent
    start = agent.__init__

    def start_on_host(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.nixl_mems = {**self.nixl_mems, "VRAM": self.nixl_mems["DRAM"]}

    agent.__init__ = start_on_host


BEFORE_IMPORT: dict[str, Callable[[], None]] = {"torchvision": declare_torchvision_operators}
AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "sglang.srt.disaggregation.mooncake.conn": send_page_indices_from_host,
    "nixl_cu12._api": register_kv_as_host_memory,
    "nixl_cu13._api": register_kv_as_host_memory,
}


class Patches:
    """A finder which runs each patch once, at the import of the module that it is for."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if before := BEFORE_IMPORT.pop(name, None):
            before()
        after = AFTER_IMPORT.pop(name, None)
        if after is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            after(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Patches())
