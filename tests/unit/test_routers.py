"""Which router goes with what, and what it is started with."""

from __future__ import annotations

from typing import Any

import pytest
from unit.plans import Json, host, inputs, plan

from pdlib import flags, routers, units
from pdlib.errors import UserError
from pdlib.plan import Planner

TWO = {"n1": host(1), "n2": host(2)}
VLLM: dict[str, Any] = {"engine": "vllm", "model": "m"}
SGLANG: dict[str, Any] = {"engine": "sglang", "model": "m"}
RANDOM = {"router_policy": "random"}


def tail(made: Json) -> list[str]:
    """The router's arguments after its module."""
    argv = made["router"]["argv"]
    return list(argv[argv.index("-m") + 2 :])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({**VLLM}, ["router=sglang-router cannot route for engine vllm", "set router to smg or vllm-router"]),
        ({**VLLM, "ratio": "agg"}, ["router=sglang-router cannot route for engine vllm"]),
        ({**SGLANG, "router": "vllm-router"}, ["router=vllm-router cannot route for engine sglang", "sglang-router or smg"]),
        ({"router": "smgg"}, ["router='smgg'", "did you mean smg?"]),
        (
            {**SGLANG, "router_policy": "power_of_two"},
            [
                "router_policy=power_of_two",
                "asks workers for /get_load, which sglang 0.5.23 does not have",
                "router=smg",
                "least_load",
            ],
        ),
        ({**SGLANG, "router_decode_policy": "power_of_two"}, ["router_decode_policy=power_of_two", "/get_load"]),
        (
            {**SGLANG, "router_policy": "least_load"},
            ["router_policy='least_load'", "sglang-router 0.3.2 has random", "smg has it"],
        ),
        (
            {**VLLM, "router": "vllm-router", "router_policy": "least_load"},
            ["vllm-router 0.1.17 has", "sticky_least_loaded", "smg"],
        ),
        (
            {**VLLM, "router": "vllm-router", "router_policy": "power_of_two"},
            ["asks workers for /get_load, which vllm 0.33.0 does not"],
        ),
        ({**SGLANG, "router_decode_policy": "bucket"}, ["router_decode_policy='bucket'"]),
        ({**SGLANG, "router": "mini-lb"}, ["router_policy='round_robin'", "mini-lb 0.3.2 has random"]),
        (
            {**SGLANG, "router": "mini-lb", "router_policy": "random", "ratio": "2agg"},
            ["router=mini-lb is for prefill and decode"],
        ),
        ({**SGLANG, "router": "mini-lb", "router_policy": "random", "api_key": "k"}, ["router=mini-lb sends workers no api_key"]),
        ({**VLLM, "router": "vllm-router", "api_key": "k"}, ["router=vllm-router sends workers no api_key"]),
    ],
)
def test_what_cannot_work_is_refused_by_name(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        plan(TWO, **{"ratio": "1p1d", **options})
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        {**SGLANG, "engine_version": "0.5.17", "router_policy": "power_of_two"},  # /get_load is there
        {**SGLANG, "router": "smg", "router_policy": "power_of_two"},
        {**SGLANG, "router": "smg", "router_prefill_policy": "bucket", "router_decode_policy": "least_load"},
        {**SGLANG, "router_prefill_policy": "bucket"},
        {"engine": "emulated", "router_policy": "power_of_two"},
    ],
)
def test_what_can_work_is_planned(options: dict[str, Any]) -> None:
    argv = tail(plan(TWO, "1p1d", **options))
    for name in ("policy", "prefill-policy", "decode-policy"):
        policy = options.get(f"router_{name.replace('-', '_')}")
        assert policy is None or argv[argv.index(f"--{name}") + 1] == policy


def test_every_router_has_a_virtualenv_of_its_own() -> None:
    """sglang-router and smg both install a command called smg."""
    pythons = {}
    for name, facts in routers.ROUTERS.items():
        made = plan(TWO, "1p1d", engine=facts.engines[0], model="m", router=name, router_policy="random")
        pythons[name] = made["router"]["argv"][0]
        (row,) = (row for row in made["hosts"]["n1"]["installs"] if row["name"].startswith(facts.package))
        assert made["router"]["argv"][0] == f"/opt/pd/{row['name']}/bin/python"
        assert row["requirements"] == list(facts.requirements)
    assert len(set(pythons.values())) == 3
    assert pythons["mini-lb"] == pythons["sglang-router"]


def test_smg_speaks_as_its_predecessor_does_and_learns_members_while_it_runs() -> None:
    made = plan(TWO, "1p1d", **SGLANG, router="smg")
    argv = tail(made)
    assert argv[argv.index("--prefill") :] == [
        "--prefill",
        "http://127.0.0.1:30000",
        "8998",
        "--decode",
        "http://127.0.0.1:30001",
    ]
    assert made["router"]["members"] == argv[argv.index("--prefill") :]
    assert (made["router"]["membership"], made["router"]["registration"]) == ("workers", {})
    more = plan(TWO, "1p2d", current=made, **SGLANG, router="smg")
    assert identity(made) == identity(more)


def test_smg_registers_vllm_workers_with_their_connector_or_they_recompute_in_silence() -> None:
    made = plan(TWO, "1p1d", **VLLM, router="smg")["router"]
    assert made["registration"] == {"runtime_type": "vllm", "kv_connector": "NixlConnector", "kv_role": "kv_both"}
    assert not {"--prefill", "--decode"} & set(made["argv"])
    assert "--pd-disaggregation" in made["argv"]
    alone = plan(TWO, "2agg", **VLLM, router="smg")["router"]
    assert alone["registration"] == {}
    assert alone["argv"][-2:] == ["http://127.0.0.1:30000", "http://127.0.0.1:30001"]


def test_vllm_router_is_restarted_for_other_members() -> None:
    made = plan(TWO, "1p1d", **VLLM, router="vllm-router", ready_timeout=77)
    argv = tail(made)
    assert "--vllm-pd-disaggregation" in argv
    assert argv[argv.index("--kv-connector") + 1] == "nixl"
    assert argv[argv.index("--worker-startup-timeout-secs") + 1] == "77"
    assert argv[argv.index("--prefill") :] == ["--prefill", "http://127.0.0.1:30000", "--decode", "http://127.0.0.1:30001"]
    assert (made["router"]["membership"], made["router"]["members"]) == ("restart", [])
    more = plan(TWO, "1p2d", current=made, **VLLM, router="vllm-router")
    assert identity(made) != identity(more)


def test_the_debugging_balancer_is_a_flag_of_sglang_router() -> None:
    argv = tail(plan(TWO, "1p1d", **SGLANG, router="mini-lb", router_policy="random"))
    assert argv[: argv.index("--prefill")] == [
        *("--host", "127.0.0.1", "--port", "8000", "--policy", "random", "--pd-disaggregation", "--mini-lb"),
    ]


@pytest.mark.parametrize("name", ["kv-connector", "worker_startup_timeout_secs", "vllm-pd-disaggregation", "mini-lb"])
def test_what_the_plan_sets_is_no_router_argument(name: str) -> None:
    with pytest.raises(UserError, match=r"router_args: .* is set by the plan; set"):
        plan(TWO, "1p1d", **VLLM, router="vllm-router", router_args={name: True})


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({**SGLANG, "router_args": {"request-timeout-sec": 5}},
         ["router_args: sglang-router 0.3.2 has no flag request-timeout-sec", "did you mean request-timeout-secs?"]),
        ({**SGLANG, "router_args": {"request_timeout_secs": "soon"}}, ["router_args: request-timeout-secs='soon': expected int"]),
        ({**SGLANG, "router_args": {"log_level": "loud"}}, ["router_args: log-level='loud': one of debug, info"]),
        ({**SGLANG, "router_args": {"disable-retries": "yes"}}, ["disable-retries is a switch; give true or false"]),
        ({**SGLANG, "router": "smg", "router_args": {"mini-lb": True}}, ["mini-lb is set by the plan; set router"]),
        ({**SGLANG, "router_args": {"assignment-mode": "min_lod"}}, ["one of random, min_load", "did you mean min_load?"]),
        ({**VLLM, "router": "vllm-router", "router_args": {"assignment-mode": "random"}}, ["vllm-router 0.1.17 has no flag"]),
    ],
)  # fmt: skip
def test_what_the_router_has_not_is_refused(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        plan(TWO, "1p1d", **options)
    for part in parts:
        assert part in str(refused.value)


def test_wrong_router_arguments_are_refused_before_hosts_say_what_they_have() -> None:
    unknown = {"n1": {"gpus": "auto"}, "n2": {"gpus": "auto"}}
    with pytest.raises(UserError, match=r"router_args: sglang-router 0\.3\.2 has no flag retris"):
        Planner(inputs(unknown, "1p1d", **SGLANG, router_args={"retris": 1})).check_flags()


def test_good_router_arguments_stand_in_the_routers_spelling_and_before_its_members() -> None:
    argv = tail(plan(TWO, "1p1d", **SGLANG, router_args={"request_timeout_secs": 600, "disable_retries": True}))
    assert argv[argv.index("--request-timeout-secs") + 1] == "600"
    assert argv.index("--disable-retries") < argv.index("--prefill")


@pytest.mark.parametrize("name", routers.ROUTERS)
@pytest.mark.parametrize("disaggregated", [True, False])
def test_the_recorded_parser_of_a_router_takes_what_the_plan_sets(name: str, disaggregated: bool) -> None:
    facts = routers.ROUTERS[name]
    if not (disaggregated or facts.aggregated):
        return
    table = flags.load_router(facts.package, facts.version)
    ratio = "1p1d" if disaggregated else "2agg"
    options: dict[str, Any] = {"router_policy": facts.policies[-1], "router_decode_policy": facts.policies[0]}
    made = plan(TWO, ratio, engine=facts.engines[0], model="m", router=name, **(options if name != "mini-lb" else {**RANDOM}))
    given = [item.removeprefix("--") for item in tail(made) if item.startswith("--")]
    assert not [flag for flag in given if flag not in table.flags]
    assert not [flag for flag in given if table.flags[flag]["deprecated"]]
    assert set(facts.policies) <= set(table.flags["policy"]["choices"]), "a policy that it has not"
    if disaggregated and facts.prefill_policies:
        assert set(facts.prefill_policies) <= set(table.flags["prefill-policy"]["choices"])


def identity(made: Json) -> str:
    (unit,) = (unit for unit in units.host_units(made, "n1") if unit["name"] == "pd-router")
    return units.identity(unit)
