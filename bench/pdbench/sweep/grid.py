"""From a sweep's file to its cells: what is deployed and what is sent, for each. Pure."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pdbench.sweep.spec import INVENTORY, Spec
from pdlib import ratio as ratios
from pdlib.variables import BENCH, VARIABLES

Json = dict[str, Any]

#: Aggregated workers move no KV cache and know no roles: variables of these say nothing about them.
_PD_ONLY = ("transfer_backend", "router_prefill_policy", "router_decode_policy", "kv_probe")
_LETTERS = {
    "bench_concurrency": "c",
    "bench_request_rate": "rate",
    "bench_input_len": "i",
    "bench_output_len": "o",
    "bench_num_requests": "n",
    "bench_batch": "b",
    "tensor_parallel_size": "tp",
}
_LONGEST_ID = 80


@dataclass(frozen=True)
class Cell:
    """One configuration under one load, measured once a repeat.

    ``variables``: what the sweep varies. ``deploy`` and ``load``: all that is given to the plays, fixed variables included, by
    whether it belongs to the deployment or to the load. ``inventory``: the cluster. ``baseline``: added for comparison.
    """

    id: str
    variables: Json
    deploy: Json
    load: Json
    inventory: str
    baseline: bool = False

    @property
    def deployment(self) -> str:
        """What two cells have in common when nothing is restarted between them."""
        return canonical({"inventory": self.inventory, **self.deploy})

    def deployment_words(self) -> str:
        """Return what is swept of the deployment, in a few words; "" when nothing is."""
        words = _words({name: value for name, value in self.variables.items() if name not in self.load})
        return words if len(words) <= _LONGEST_ID else f"{words[: _LONGEST_ID - 1]}…"

    def to_json(self) -> Json:
        """Return the cell as sweep.json has it."""
        return {
            "id": self.id, "variables": self.variables, "deploy": self.deploy, "load": self.load, "inventory": self.inventory,
            "baseline": self.baseline,
        }  # fmt: skip


def canonical(value: Any) -> str:
    """Return JSON that is equal for equal values."""
    return json.dumps(value, sort_keys=True)


def cells(spec: Spec, inventory: str) -> list[Cell]:
    """Return the cells in the order of the file, the last axis changing fastest, then those of `cells:`; equal ones are one.

    ``inventory``: of cells that name none.
    """
    given: list[Json] = []
    if spec.axes:
        for values in itertools.product(*spec.axes.values()):
            given.append({name: item for value in values for name, item in value.items()})
    given += spec.listed
    return unique(_cell(swept, spec.fixed, inventory) for swept in given)


def _cell(swept: Mapping[str, Any], fixed: Mapping[str, Any], inventory: str, baseline: bool = False) -> Cell:
    everything = {**fixed, **swept}
    where = str(everything.pop(INVENTORY, inventory))
    if "ratio" in everything and not ratios.parse(everything["ratio"]).disaggregated:
        swept = {name: value for name, value in swept.items() if not _only_pd(name)}
        everything = {name: value for name, value in everything.items() if not _only_pd(name)}
    load = {name: value for name, value in everything.items() if VARIABLES[name].scope == BENCH}
    deploy = {name: value for name, value in everything.items() if name not in load}
    return Cell(_words(swept) or "cell", dict(swept), deploy, load, where, baseline)


def _only_pd(name: str) -> bool:
    return name in _PD_ONLY or name.startswith(("prefill_", "decode_"))


def baseline_of(cell: Cell, gpus: int, gpus_each: int) -> Cell | None:
    """Return ``cell`` on aggregated workers of ``gpus_each`` GPUs on as many ``gpus``; None when they do not divide."""
    if gpus % gpus_each:
        return None
    ratio = str(ratios.Ratio(aggregated=gpus // gpus_each))
    fixed = {name: value for name, value in {**cell.deploy, **cell.load}.items() if name not in cell.variables}
    return _cell({**cell.variables, "ratio": ratio}, fixed, cell.inventory, baseline=True)


def unique(found: Iterable[Cell]) -> list[Cell]:
    """Return the cells without those that are equal to an earlier one, each with an id of its own."""
    kept: dict[str, Cell] = {}
    for cell in found:
        kept.setdefault(canonical([cell.deployment, cell.load]), cell)
    ids: set[str] = set()
    result = []
    for content, cell in kept.items():
        name = cell.id
        if name in ids or len(name) > _LONGEST_ID:
            name = f"{name[: _LONGEST_ID - 9]}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
        ids.add(name)
        result.append(replace(cell, id=name))
    return result


def _words(swept: Mapping[str, Any]) -> str:
    ordered = sorted(swept, key=lambda name: (name != "ratio", VARIABLES[name].scope == BENCH if name in VARIABLES else False))
    return "-".join(filter(None, (_word(name, swept[name]) for name in ordered)))


def _word(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        text = "_".join(f"{key}_{item}" for key, item in sorted(value.items())) or "none"
    elif isinstance(value, list):
        text = "_".join(str(item) for item in value)
    else:
        text = str(value)
    text = text.rsplit("/", 1)[-1] if name in ("model", INVENTORY) else text
    text = re.sub(r"[^A-Za-z0-9._]+", "_", text).strip("._")
    return _LETTERS.get(name, "") + text


def loads(found: Iterable[Cell]) -> dict[str, int]:
    """Return distinct loads -> their number, in the order of the cells."""
    numbers: dict[str, int] = {}
    for cell in found:
        numbers.setdefault(canonical(cell.load), len(numbers))
    return numbers


def seed(cell: Cell, repeat: int, numbers: Mapping[str, int]) -> int:
    """Return the seed of a cell's requests: equal for all configurations, another for every load and repeat.

    So configurations are compared on the same requests in the same order, and no run finds prompts in a prefix cache that the
    run before it left there. A seed that the file sets is where counting starts.
    """
    first = int(cell.load.get("bench_seed", VARIABLES["bench_seed"].default))
    return first + 1000 * (repeat - 1) + numbers[canonical(cell.load)]
