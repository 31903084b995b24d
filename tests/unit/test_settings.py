"""What the user wrote becomes typed values, or one message with variable, value and place."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlib import settings
from pdlib.errors import UserError, listing
from pdlib.variables import BENCH, CLUSTER, HOST, SCOPES, VARIABLES, VERB


def convert(name: str, value: Any) -> Any:
    return settings.convert(VARIABLES[name], value, "host n1, inventory or group_vars")


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("tensor_parallel_size", "2", 2),
        ("tensor_parallel_size", 2.0, 2),
        ("tensor_parallel_size", None, 1),
        ("mem_fraction", "0.5", 0.5),
        ("mem_fraction", 1, 1.0),
        ("gpus", 4, [0, 1, 2, 3]),
        ("gpus", "2", [0, 1]),
        ("gpus", 0, []),
        ("gpus", "1,3", [1, 3]),
        ("gpus", [3, "1"], [3, 1]),
        ("gpus", "auto", "auto"),
        ("gpus", None, None),
        ("gpus_shared", "yes", True),
        ("gpus_shared", "Off", False),
        ("gpus_shared", True, True),
        ("rdma_devices", "mlx5_0, mlx5_1,", ["mlx5_0", "mlx5_1"]),
        ("rdma_devices", [], []),
        ("bench_concurrency", "32,64, 128", [32, 64, 128]),
        ("bench_concurrency", 32, [32]),
        ("bench_request_rate", 4.5, [4.5]),
        ("bench_input_len", 512, "512"),
        ("bench_input_len", "256-1024", "256-1024"),
        ("bench_input_len", "7-7", "7-7"),
        ("engine_args", {"page-size": 16, 3: 4}, {"page-size": 16, "3": 4}),
        ("model", "a/b", "a/b"),
        ("engine_version", 0.5, "0.5"),
    ],
)
def test_typed_values(name: str, value: Any, wanted: Any) -> None:
    result = convert(name, value)
    assert result == wanted
    assert type(result) is type(wanted)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("tensor_parallel_size", 0, "at least 1"),
        ("tensor_parallel_size", "two", "expected a whole number"),
        ("tensor_parallel_size", 1.5, "expected a whole number"),
        ("tensor_parallel_size", True, "expected a whole number"),
        ("tensor_parallel_size", [1], "expected a whole number"),
        ("tensor_parallel_size", {}, "expected a whole number"),
        ("router_port", 70000, "at most 65535"),
        ("mem_fraction", 1.5, "at most 1.0"),
        ("mem_fraction", 0, "at least 0.01"),
        ("mem_fraction", "nan", "expected a number"),
        ("bench_slo_ttft_ms", "inf", "expected a number"),
        ("gpus", "all", "a count, a list of indices such as [0, 1], or auto"),
        ("gpus", -1, "a count, a list of indices"),
        ("gpus", [0, -1], "a count, a list of indices"),
        ("gpus", True, "a count"),
        ("prefill_gpus", "0,x", "whole numbers"),
        ("gpus_shared", "maybe", "true or false"),
        ("gpus_shared", 2, "true or false"),
        ("rdma_devices", {"mlx5_0": 1}, "expected a list"),
        ("bench_concurrency", "32;64", "whole numbers such as 32,64"),
        ("bench_concurrency", "32,0", "at least 1"),
        ("bench_concurrency", True, "whole numbers"),
        ("bench_input_len", "1024-256", "a length such as 512"),
        ("bench_input_len", 0, "a length such as 512"),
        ("bench_input_len", "0-4", "a length such as 512"),
        ("bench_input_len", -5, "a length such as 512"),
        ("engine_args", "page-size=16", "a mapping such as {key: value}"),
        ("engine_args", ["a"], "a mapping"),
        ("model", ["a"], "expected text"),
        ("router_policy", "rond_robin", "did you mean round_robin?"),
        ("rdma_fabric", "IB", "one of infiniband, roce, none, auto"),
        ("runtime", "dokcer", "did you mean docker?"),
        ("bench_concurrency", "", "not none at all"),
        ("state_dir", "pd", "expected an absolute path"),
        ("install_dir", "~/pd", "expected an absolute path"),
        ("address", "fd00::11", "expected an IPv4 address; a deployment over IPv6 was never tried"),
        ("address", "[fd00::11]", "expected an IPv4 address"),
        ("listen_address", "::", "expected an IPv4 address"),
    ],
)
def test_a_mistake_names_variable_value_place_and_what_is_right(name: str, value: Any, part: str) -> None:
    with pytest.raises(UserError) as refused:
        convert(name, value)
    message = str(refused.value)
    assert message.startswith(f"{name}={value!r} (host n1, inventory or group_vars): ")
    assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("key", ["", "two words", "line\n", " k", "schl\u00fcssel"])
def test_a_key_is_one_word(key: str) -> None:
    with pytest.raises(UserError, match=r"api_key \(host n1, inventory or group_vars\): expected one word"):
        convert("api_key", key)
    assert convert("api_key", "one-w0rd") == "one-w0rd"


def test_a_secret_is_not_typed_where_everybody_sees_it() -> None:
    for typed in (["api_key=s3cret"], ["ratio=1p1d", '{"api_key": "s3cret"}'], ["ratio=1p1d api_key=s3cret"]):
        with pytest.raises(UserError, match=r"-e api_key=...: every user of this machine sees it in `ps`") as refused:
            settings.check_typed({"ratio": "1p1d", "api_key": "s3cret"}, typed)
        assert "s3cret" not in str(refused.value)
    settings.check_typed({"ratio": "1p1d", "api_key": "s3cret"}, ["ratio=1p1d", "@s3cret.yml"])
    settings.check_typed({"api_key": "generate"}, ["api_key=generate"])


def test_a_secret_does_not_come_with_e_into_plans_and_results() -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "client_secret"):
        for variable in ("engine_env", "decode_engine_env"):
            with pytest.raises(UserError, match=rf"^-e {variable}=...: {name} is a secret .* hf_token \(in a vault") as refused:
                settings.check_extra_vars({variable: {"A": "1", name: "s3cret"}})
            assert "s3cret" not in str(refused.value)
    harmless = {"TOKENIZERS_PARALLELISM": "false", "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": 128, "HF_TOKEN_PATH": "/t"}
    settings.check_extra_vars({"engine_env": harmless, "prefill_engine_env": None, "decode_engine_env": "A_KEY"})


def test_a_secret_is_not_shown() -> None:
    with pytest.raises(UserError) as refused:
        convert("api_key", ["s3cret"])
    assert "s3cret" not in str(refused.value)
    hosts = {h: settings.host_settings(h, {"api_key": f"s3cret{h}"}, {}) for h in ("a", "b")}
    with pytest.raises(UserError, match="api_key differs on hosts a and b") as refused:
        settings.cluster_settings(hosts)
    assert "s3cret" not in str(refused.value)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@given(st.sampled_from(sorted(VARIABLES)), JUNK)
def test_any_value_is_converted_or_refused_in_words(name: str, value: Any) -> None:
    variable = VARIABLES[name]
    try:
        result = convert(name, value)
    except UserError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert message.startswith((f"{name}=", f"{name} ("))
        return
    assert convert(name, result) == result, "what was converted converts to itself"
    if variable.choices and result is not None:
        assert result in variable.choices or result == variable.default


def test_where_a_wrong_value_was_set() -> None:
    with pytest.raises(UserError, match=r"tensor_parallel_size='two' \(-e\)"):
        settings.host_settings("n1", {"tensor_parallel_size": "two"}, {"tensor_parallel_size": "two"})
    with pytest.raises(UserError, match=r"\(host n1, inventory or group_vars\)"):
        settings.host_settings("n1", {"tensor_parallel_size": "two"}, {})


def test_defaults_are_what_the_table_says() -> None:
    values = settings.host_settings("n1", {}, {})
    assert values == {name: row.default for name, row in VARIABLES.items()}
    for name, row in VARIABLES.items():
        assert convert(name, row.default) == row.default


def test_extra_vars_are_strict() -> None:
    settings.check_extra_vars({"ratio": "3p1d", "ansible_user": "x", "bench_num_requests": 1})
    with pytest.raises(UserError, match=r"there is no variable ratoi; did you mean ratio\?"):
        settings.check_extra_vars({"ratoi": "3p1d"})
    with pytest.raises(UserError, match=r"'3p1d' is no name=value; .*JSON"):
        settings.check_extra_vars({"_raw_params": "3p1d"})
    with pytest.raises(UserError, match=r"no variable qqqq; docs/variables.md"):
        settings.check_extra_vars({"qqqq": 1})


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("tensor_paralel_size", "tensor_parallel_size"),
        ("rdma_device", "rdma_devices"),
        ("adress", "address"),
        ("prefill_engine_arg", "prefill_engine_args"),
        ("router_prot", "router_port"),
    ],
)
def test_inventory_names_close_to_ours_are_refused(wrong: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"host n2 sets {wrong}, which does nothing; did you mean {meant}\?"):
        settings.check_inventory_names({"n1": ["address"], "n2": ["gpus", wrong]})


def test_hosts_of_one_machine_have_state_dirs_of_their_own() -> None:
    settings.check_state_dirs({"a": "/var/lib/pd-a", "b": "/var/lib/pd-b"})
    with pytest.raises(UserError, match="hosts a and c are this machine and share state_dir=/pd: give each its own"):
        settings.check_state_dirs({"a": "/pd", "b": "/pd-b", "c": "/pd"})


def test_templates_are_not_taken_from_the_command_line() -> None:
    settings.check_templates({"model": "a/b", "ansible_user": "{{ me }}"})
    with pytest.raises(UserError, match=r"-e model=\.\.\.: a template belongs in the inventory"):
        settings.check_templates({"model": "{{ site }}/b"})


def test_inventory_names_of_the_users_own_are_not_our_business() -> None:
    own = ["site", "datacenter", "rack", "ansible_host", "_private", "ntp_servers", "node_exporter_version", "users", "proxy_url"]
    settings.check_inventory_names({"n1": [*own, *VARIABLES]})


def test_a_cluster_value_is_one_value() -> None:
    one = settings.host_settings("a", {"ratio": "3p1d", "gpus": 2}, {})
    other = settings.host_settings("b", {"ratio": "1p1d", "gpus": 4}, {})
    with pytest.raises(UserError, match=r"ratio is '3p1d' and '1p1d' on hosts a and b: .*group_vars/all.yml"):
        settings.cluster_settings({"a": one, "b": other})
    values = settings.cluster_settings({"a": one, "b": {**one, "gpus": [7]}})
    assert values["ratio"] == "3p1d"
    assert set(values) == {name for name, row in VARIABLES.items() if row.scope != HOST}
    with pytest.raises(UserError, match="no host"):
        settings.cluster_settings({})


def test_the_table_of_variables_is_sound() -> None:
    assert set(SCOPES) == {CLUSTER, HOST, BENCH, VERB}
    for name, row in VARIABLES.items():
        assert row.name == name
        assert row.scope in SCOPES
        assert row.doc.endswith(".")
        if row.choices and row.default is not None:
            assert row.default in row.choices
        assert settings._EXPECTED.keys() == settings._CONVERT.keys()
        assert row.type in settings._CONVERT


def test_listing() -> None:
    assert [listing(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
