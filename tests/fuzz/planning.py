"""What users write in inventories and after ``-e``, through the very action that `plan.yml` begins with; and deployed plans."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ansible import context
from ansible.errors import AnsibleActionFail
from ansible.module_utils.common.collections import ImmutableDict
from hypothesis import strategies as st

from fuzz import law
from fuzz.damage import ODD, as_json, spoiled, torn
from pdbench.sweep import checkout as checkout  # pdlib comes from there
from pdlib import ratio as ratios
from pdlib.errors import UserError
from pdlib.variables import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]
#: variables that say where on this machine something is written, or whose values are plans and checked on their own
_NOT_DRAWN = ("plan_dir", "current_plan", "results_dir")


class Vars(dict[str, Any]):
    """Ansible's `hostvars`, as far as the action looks at it."""

    def raw_get(self, host: str) -> Any:
        return self[host]


@functools.cache
def action() -> ModuleType:
    found = importlib.util.spec_from_file_location("pd_plan_action", ROOT / "plugins" / "action" / "pd_plan.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    module.display = SimpleNamespace(display=lambda text: None)  # type: ignore[attr-defined]
    return module


@contextlib.contextmanager
def _typed(extra: Json) -> Iterator[None]:
    """What was typed after ``-e``."""
    module: Any = action()
    before, cli = module.load_extra_vars, context.CLIARGS
    module.load_extra_vars = lambda loader: dict(extra)
    context.CLIARGS = ImmutableDict(inventory=["inventory/fuzz"], subset=None)
    try:
        yield
    finally:
        module.load_extra_vars, context.CLIARGS = before, cli


def planned(hosts: Mapping[str, Json], extra: Json, groups: Json | None = None) -> Json | None:
    """The plan that `plan.yml` would make; None when it is refused in words."""
    names = list(hosts)
    groups = (
        {"prefill_nodes": names, "decode_nodes": names, "router": names[:1], "bench_clients": []} if groups is None else groups
    )
    module: Any = action()
    one = module.ActionModule.__new__(module.ActionModule)
    with tempfile.TemporaryDirectory(prefix="pd-fuzz-") as folder:
        one._task = SimpleNamespace(args={"verb": "plan"})
        one._loader = None
        hostvars = Vars({name: {**own, **extra, "plan_dir": folder} for name, own in hosts.items()})
        facts = {"groups": groups, "hostvars": hostvars, "inventory_hostname": next(iter(hosts)), "ansible_play_hosts_all": names}
        with _typed(extra):

            def made() -> Json:
                try:
                    one._run(facts)
                except UserError as error:
                    raise AnsibleActionFail(str(error)) from None
                return dict(json.loads((Path(folder) / "plan.json").read_text()))

            return law.read(made, AnsibleActionFail)


def _hosts(engine: str) -> dict[str, Json]:
    own = {"engine": engine, "ratio": "1p1d", "state_dir": "/var/lib/pd", "service_manager": "systemd"}
    own |= {} if engine == "emulated" else {"model": "a/b"}
    # vLLM has a router of its own.
    own |= {"router": "vllm-router"} if engine == "vllm" else {}
    return {
        f"h{n}": {**own, "address": f"127.0.0.{n + 1}", "gpus": 4, "rdma_fabric": "none", "ansible_host": "x"} for n in range(2)
    }


ENGINES = st.sampled_from(["emulated", "sglang", "vllm"])
NAMES = sorted(set(VARIABLES) - set(_NOT_DRAWN))
_GOOD: dict[str, st.SearchStrategy[Any]] = {
    "int": st.sampled_from([1, 2, "2", 4.0, 64]), "float": st.sampled_from([0.5, 1, "0.25"]),
    "bool": st.sampled_from([True, "no"]), "span": st.sampled_from(["512", "8-9"]),
    "list": st.sampled_from([[], ["a"], "a, b", [1.5]]), "dict": st.sampled_from([{}, {"a": 1}, {"page-size": 16}]),
    "ints": st.sampled_from([[0], "0,1", 1]), "gpus": st.sampled_from([4, [0, 1], "auto", 0]),
    "str": st.sampled_from(["x", "/x", "", "1p1d", "a b"]),
    "networks": st.sampled_from([[], "10.0.0.0/8, 192.0.2.7", ["fd00::/8"]]), "ports": st.sampled_from([[], 50051, "1-2, 7"]),
}  # fmt: skip


@st.composite
def given(draw: st.DrawFn) -> tuple[str, Any]:
    """A variable and a value: of its type, one of its choices, or anything."""
    row = VARIABLES[draw(st.sampled_from(NAMES))]
    choices = [st.sampled_from(row.choices)] if row.choices else []
    return row.name, draw(st.one_of(_GOOD[row.type], ODD, *choices))


def inventory(data: st.DataObject) -> None:
    """Any variables of any documented type, on one host or on all."""
    hosts = _hosts(data.draw(ENGINES))
    for name, value in data.draw(st.lists(given(), min_size=1, max_size=3)):
        for host in data.draw(st.sampled_from([["h0"], ["h1"], ["h0", "h1"], ["h0", "h1"]])):
            hosts[host][name] = value
    planned(hosts, {})


def extra_vars(data: st.DataObject) -> None:
    """The same after ``-e``, misspelt names among them."""
    extra = dict(data.draw(st.lists(given(), min_size=1, max_size=2)))
    if data.draw(st.integers(0, 4)) == 0:
        extra[data.draw(st.sampled_from(["ratoi", "", "_raw_params", "x" * 3000, "ansible_x", "é", "model "]))] = data.draw(ODD)
    planned(_hosts(data.draw(ENGINES)), extra)


def groups(data: st.DataObject) -> None:
    """Groups that lack, empty, or name hosts twice."""
    good = {"prefill_nodes": ["h0", "h1"], "decode_nodes": ["h1"], "router": ["h0"], "bench_clients": ["h1"]}
    kept = st.lists(st.sampled_from(["h0", "h1"]), max_size=2, unique=True)
    found = {name: data.draw(kept) for name in good if data.draw(st.integers(0, 9))}
    planned(_hosts("emulated"), {"ratio": data.draw(st.sampled_from(["1p1d", "agg", "3p5d", "2agg"]))}, found)


def ratio(data: st.DataObject) -> None:
    """A ratio is refused with the grammar, or reads back as itself."""
    text = data.draw(st.one_of(ODD, torn(b"13p2d").map(lambda b: b.decode("utf-8", "replace"))))
    found = law.read(lambda: ratios.parse(text), UserError, "ratio")
    if found is not None:
        assert ratios.parse(str(found)) == found
        planned(_hosts("emulated"), {"ratio": text})


def good_spellings(data: st.DataObject) -> None:
    """Numbers as text, lists as text and the host's own variables change no plan."""
    hosts = _hosts("sglang")
    plain = planned(hosts, {})
    spelt = {"gpus": data.draw(st.sampled_from([4, "4", 4.0, [0, 1, 2, 3], "0,1,2,3"])), "x_of_mine": data.draw(ODD)}
    spelt |= {
        "tensor_parallel_size": data.draw(st.sampled_from([1, "1", 1.0, None])),
        "gpus_shared": data.draw(st.sampled_from(["no", 0, False])),
    }
    other = planned(
        {name: {**own, **spelt} for name, own in hosts.items()}, {"ratio": data.draw(st.sampled_from(["1p1d", "1P1D"]))}
    )
    assert plain is not None
    assert other is not None
    assert {**other, "overrides": {}} == {**plain, "overrides": {}}


@functools.cache
def _deployed() -> bytes:
    made = planned(_hosts("sglang"), {"ratio": "3p1d", "firewall": True})
    assert made is not None
    return as_json(made)


def current_plan(data: st.DataObject) -> None:
    """A deployed plan that was damaged: `-e current_plan=FILE`, which placement starts from."""
    good = json.loads(_deployed())
    text = data.draw(st.one_of(spoiled(good).map(as_json), spoiled(good).map(as_json), torn(_deployed())))
    with tempfile.TemporaryDirectory(prefix="pd-fuzz-") as folder:
        path = Path(folder) / "plan.json"
        path.write_bytes(text)
        planned(_hosts("sglang"), {"ratio": "2p2d", "firewall": True, "current_plan": str(path)})


SURFACES: dict[str, Callable[[st.DataObject], None]] = {
    one.__name__: one for one in (inventory, extra_vars, groups, ratio, good_spellings, current_plan)
}
