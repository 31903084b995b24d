"""An inventory from a Slurm allocation: its nodes, by the environment that `salloc` and `sbatch` give."""

from __future__ import annotations

import re
from typing import Callable, Dict, List, Mapping

from .errors import UserError

NODES, GPUS = "SLURM_JOB_NODELIST", "SLURM_GPUS_ON_NODE"
#: What `--gpus-per-node` was, ``8`` or ``h200:8``: the shell of `salloc` on a login node has no other.
ASKED = "SLURM_GPUS_PER_NODE"
_MOST = 4096
_GPUS = re.compile(r"(?:[^:,]+:)?([0-9]+)")
_NUMBERS = re.compile(r"(\d+)(?:-(\d+))?$")


def expand(nodelist: str) -> List[str]:
    """Return the nodes of a list as Slurm writes it, ``gpu[01-03,7],login,r[1-2]n[1-2]``; raise UserError for what is none.

    Numbers keep their leading zeros, as `scontrol show hostnames` has it.
    """
    found: List[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodelist):
        names = [""]
        for text, numbers in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", part):
            ends = [text] if text else _numbers(numbers, nodelist)
            names = [name + end for name in names for end in ends]
            if len(names) > _MOST:
                raise UserError(f"{NODES}={nodelist}: more than {_MOST} nodes")
        found += names
    if not found or _shape(nodelist):
        raise UserError(f"{NODES}={nodelist!r} is no list of nodes; Slurm writes it like gpu[01-04],big7")
    return list(dict.fromkeys(found))


def _shape(nodelist: str) -> str:
    """Return what is left of a list when everything that belongs into one is taken out."""
    return re.sub(r"[A-Za-z0-9._-]+(?:,(?=[A-Za-z0-9]))?", "", re.sub(r"\[[0-9,-]+\]", "x", nodelist))


def _numbers(text: str, nodelist: str) -> List[str]:
    found = []
    for part in text.split(","):
        match = _NUMBERS.match(part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(last) < int(first) or int(last) - int(first) >= _MOST:
            raise UserError(f"{NODES}={nodelist}: [{text}] is no list of numbers such as [01-04,7]")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


def inventory(environment: Mapping[str, str], address_of: Callable[[str], str]) -> Dict[str, object]:
    """Return Ansible's inventory of the allocation: every node may prefill and decode, the first has router and client.

    ``address_of`` resolves a name. Raises UserError outside of an allocation.
    """
    nodelist = environment.get(NODES, "")
    if not nodelist:
        raise UserError(
            f"{NODES} is not set: this inventory is that of a Slurm allocation; type it inside of `salloc` or `sbatch`"
        )
    nodes = expand(nodelist)
    gpus = _GPUS.fullmatch(environment.get(GPUS) or environment.get(ASKED, ""))
    known = {"gpus": int(gpus[1]) if gpus and int(gpus[1]) else "auto"}
    return {
        "prefill_nodes": {"hosts": nodes},
        "decode_nodes": {"hosts": nodes},
        "router": {"hosts": nodes[:1]},
        "bench_clients": {"hosts": nodes[:1]},
        "_meta": {"hostvars": {node: {"address": address_of(node), **known} for node in nodes}},
    }
