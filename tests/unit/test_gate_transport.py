"""What a log of UCX on real GPUs says of the way that the KV cache took (SGLang 0.5.17, NIXL 1.5.1, one host)."""

from __future__ import annotations

from pdbench.gate.transport import between_gpus

STAMP = "[1795259944.547898] [vm:3769 :2]   "
#: Host memory has tables of its own, TCP among them, whatever the GPUs do.
NOISE = """\
| 958ff8d1-0b2c-4b1a-8a4d-975235a intra-node cfg#2                |
| remote memory write by ucp_put* from host memory to cuda/dev[1] |
| Range  |    Description     |              Config               |
| 0..inf | software emulation | tcp/lo                            |
| active message by ucp_am_send* from host memory |
| 16516..inf | multi-frag copy-in | tcp/lo        |
"""
TITLE = "| remote memory write by ucp_put*(multi) from cuda/GPU0 to cuda/dev[1] |\n| Range  | Description | Config |\n"


def logged(text: str) -> str:
    return "".join(f"{STAMP}{line}\n" for line in text.splitlines())


def test_only_tables_between_gpus_count() -> None:
    assert between_gpus(logged(NOISE)) == set()
    assert between_gpus(logged(NOISE + TITLE + "| 0..inf | zero-copy   | cuda_ipc/cuda |\n" + NOISE)) == {"cuda_ipc"}
    assert between_gpus(logged(TITLE + "| 0..inf | software emulation | cuda_copy/cuda and tcp/eth0 |\n")) == {"tcp"}
    assert between_gpus(logged(TITLE + "| 8192..inf | zero-copy | rc_mlx5/mlx5_0:1 |\n")) == {"rdma"}
    assert between_gpus("POST /generate | 200 | ok\n") == set()
