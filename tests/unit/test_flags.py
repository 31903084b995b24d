"""Engine flags against the flag table of the pinned version."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.plans import write_flag_tables

from pdlib import engines, flags
from pdlib.errors import UserError
from pdlib.fabric_mask import IB_DEVICE, Setting

SHIPPED = sorted(Path(flags.__file__).with_name("flags").glob("*.json"))
OWNED = {"port": "worker_port_base", "tp-size": "tensor_parallel_size"}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> flags.FlagTable:
    write_flag_tables(tmp_path)
    monkeypatch.setattr(flags, "_FOLDER", tmp_path)
    return flags.load("sglang", "0.5.23")


def test_every_spelling_becomes_the_engines_long_one(table: flags.FlagTable) -> None:
    for spelling in ("page-size", "page_size", "--page-size", "--page_size"):
        assert flags.canonical(table, {spelling: 16}, "w", OWNED) == {"page-size": 16}


def test_versions_are_those_with_a_table(table: flags.FlagTable) -> None:
    assert flags.versions("sglang") == ["0.5.17", "0.5.23"]
    assert flags.versions("nobody") == []


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ({"page-sise": 16}, ["no flag page-sise", "did you mean page-size?", "sglang 0.5.23"]),
        ({"tensor-parallel-sise": 2}, ["no flag", "did you mean"]),
        ({"zzzz": 1}, ["has no flag zzzz"]),
        ({"port": 1}, ["port is set by the plan", "worker_port_base"]),
        ({"tp": 1}, ["tp is set by the plan", "tensor_parallel_size"]),
        ({"enable-deepep-moe": True}, ["no enable-deepep-moe any more", "--moe-a2a-backend deepep"]),
        ({"enable_deepep_moe": True}, ["any more", "--moe-a2a-backend deepep"]),
        ({"page-size": "many"}, ["page-size='many'", "expected int"]),
        ({"page-size": 1.5}, ["page-size=1.5", "expected int"]),
        ({"page-size": True}, ["page-size takes a value (int)", "not true"]),
        ({"schedule-conservativeness": "x"}, ["expected float"]),
        ({"trust-remote-code": 1}, ["trust-remote-code is a switch", "true or false", "not 1"]),
        ({"trust-remote-code": "true"}, ["is a switch"]),
        ({"attention-backend": "tritn"}, ["attention-backend='tritn'", "triton, torch_native, fa3", "did you mean triton?"]),
        ({"cuda-graph-bs": [1, "two"]}, ["cuda-graph-bs='two'", "expected int"]),
    ],
)  # fmt: skip
def test_what_the_engine_has_not_is_refused(table: flags.FlagTable, args: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        flags.canonical(table, args, "engine_args (host n1)", OWNED)
    for part in ["engine_args (host n1)", *parts]:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "args",
    [
        {"page-size": "16"},
        {"page-size": None},
        {"schedule-conservativeness": 1},
        {"trust-remote-code": False},
        {"cuda-graph-bs": [1, 2, 4]},
        {"attention-backend": "fa3"},
        {"json-model-override-args": {"a": 1}},
    ],
)
def test_good_values_pass_as_they_are(table: flags.FlagTable, args: dict[str, Any]) -> None:
    assert flags.canonical(table, args, "w", OWNED) == args


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("attn-dp-size", 8, ["sglang 0.5.17 has no flag attn-dp-size; 0.5.23 has it", "in place of enable-dp-attention",
         "(use --attn-dp-size <dp-size>)", "write it as 0.5.17 does", "or set engine_version=0.5.23"]),
        ("attention_data_parallel_size", 8, ["has no flag attention_data_parallel_size; 0.5.23 has it"]),
        ("enable-pd-role-switch", True, ["0.5.23 has it, and none does the same here: leave it out"]),
        ("attn-dp-sise", 8, ["has no flag attn-dp-sise"]),
    ],
)  # fmt: skip
def test_a_flag_of_another_version_is_told_with_that_version(name: str, value: Any, parts: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        flags.canonical(flags.load("sglang", "0.5.17"), {name: value}, "engine_args (host n1)", {})
    for part in parts:
        assert part in str(refused.value)
    # and the old way is one that the old version takes
    assert flags.canonical(flags.load("sglang", "0.5.17"), {"enable-dp-attention": True, "dp-size": 8}, "w", {})


NAME = st.from_regex(r"[a-z]{1,8}(-[a-z]{1,8})?", fullmatch=True)
WORD = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(lambda s: not s.startswith("-"))


VALUE = st.one_of(WORD, st.integers(0, 99), st.booleans(), st.none(), st.lists(WORD, min_size=1, max_size=3))


@given(st.dictionaries(NAME, VALUE))
def test_argv_parses_back(args: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name, value in args.items():
        if isinstance(value, bool):
            parser.add_argument(f"--{name}", action="store_true", dest=name)
        elif isinstance(value, list):
            parser.add_argument(f"--{name}", nargs="+", dest=name)
        else:
            parser.add_argument(f"--{name}", dest=name)
    wanted = {n: v if isinstance(v, (bool, list)) or v is None else str(v) for n, v in args.items()}
    items = flags.argv(args)
    assert all(isinstance(item, str) for item in items)
    assert vars(parser.parse_args(items)) == wanted


def test_a_mapping_is_one_item_of_json() -> None:
    items = flags.argv({"json-model-override-args": {"a b": [1, 2]}})
    assert items[0] == "--json-model-override-args"
    assert json.loads(items[1]) == {"a b": [1, 2]}
    assert len(items) == 2


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables_have_what_the_plan_sets(path: Path) -> None:
    engine, _, version = path.stem.partition("-")
    table, facts = flags.load(engine, version), engines.engine(engine)
    assert (table.engine, table.version) == (engine, version)
    if not table.flags:
        assert facts.emulated
        return
    assert len({*table.flags} & {*table.aliases}) == 0
    assert {*table.removed}.isdisjoint({*table.flags, *table.aliases})
    absent = {name for name in facts.owned if name not in table.flags and name not in table.aliases}
    assert not absent, f"{path.stem} lacks flags that the plan owns: {absent}"
    for role in ("prefill", "decode", "aggregated"):
        context = engines.WorkerContext(
            role=role, python="p", state_dir="s", model="m", served_model_name="n", listen="127.0.0.1", port=1,
            bootstrap_port=2 if role == "prefill" else None, side_channel_port=3, cache_dir="/c",
            tensor_parallel_size=2, nodes=2, node_rank=1, dist_init="a:1",
            transfer_backend="mooncake", node="n", rdma_fabric="roce", gpus=[0],
            fabric=[Setting(IB_DEVICE, "mlx5_0", "")] if engine == "sglang" else [],
            mem_fraction=0.5, profile="tiny", api_key=True, admin_api_key=facts.admin_key, address="127.0.0.1",
        )  # fmt: skip
        for name in facts.flags(context):
            assert name in table.flags, f"{path.stem} has no long flag {name}"


def test_the_default_version_of_every_engine_has_a_table() -> None:
    shipped = {path.stem for path in SHIPPED}
    for engine in engines.ENGINES.values():
        assert f"{engine.name}-{engine.default_version}" in shipped


@given(st.permutations(["page-size", "mem_fraction_static", "--log-level"]), st.permutations(["a", "b", "c"]))
def test_the_order_in_which_flags_are_written_is_no_other_command_line(names: list[str], keys: list[str]) -> None:
    shipped = flags.load("sglang", "0.5.23")
    values = {"page-size": 16, "mem_fraction_static": 0.8, "--log-level": "info"}
    found = flags.argv(flags.canonical(shipped, {name: values[name] for name in names}, "w", {}))
    assert found == ["--log-level", "info", "--mem-fraction-static", "0.8", "--page-size", "16"]
    assert flags.argv({"json": {key: 1 for key in keys}}) == ["--json", '{"a":1,"b":1,"c":1}']
    assert flags.argv({"json": {"b": 1, 10: {2: 1, "x": [{3: 1}]}}}) == ["--json", '{"10":{"2":1,"x":[{"3":1}]},"b":1}']
