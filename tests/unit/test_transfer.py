"""Which builds of the transfer engines go where, what their system must have, and what they are told."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from unit.plans import host, inputs, make_plan, plan

from pdlib import engines, images, settings, transfer, transfer_host
from pdlib.errors import UserError
from pdlib.plan import Planner
from pdlib.transfer import Host
from pdlib.transfer_table import KNOBS
from pdlib.variables import VARIABLES

REPO = Path(__file__).resolve().parents[2]
SGLANG: dict[str, Any] = {"engine": "sglang", "model": "m"}
TWO = {"n1": host(1), "n2": host(2)}
ALL = engines.ENGINES["sglang"].transfer_backends


def text(step: str) -> str:
    return (REPO / step.removeprefix("no-deps:")).read_text()


def installed(made: Mapping[str, Any], name: str = "n1") -> list[str]:
    """The requirement files of the engine's virtualenv, by their bare names."""
    row = next(row for row in made["hosts"][name]["installs"] if row["name"].startswith(("sglang-0", "vllm-0")))
    return [Path(step).stem for step in row["requirements"]]


def env_of(made: Mapping[str, Any], worker: str) -> dict[str, str]:
    return next(dict(w["ranks"][0]["env"]) for w in made["workers"] if w["name"] == worker)


# ---------------------------------------------------------------- which builds


@pytest.mark.parametrize("backend", [*ALL, "none"])
@pytest.mark.parametrize("build", transfer.BUILDS)
def test_a_host_gets_one_build_of_each_library_that_fits_or_a_reason(build: str, backend: str) -> None:
    """Law: over all hosts, no library twice, each file for that build only; the chosen one is there, or it is said why not."""
    for machine, glibc, efa, rdma in itertools.product(
        ("x86_64", "aarch64", ""), ("2.31", "2.36", ""), (False, True), (False, True)
    ):
        there = Host("n1", machine, glibc, rdma, efa)
        chosen = transfer.LIBRARY.get(backend)
        why = transfer._why_not(chosen, build, there, efa and chosen == "mooncake") if chosen else ""
        if why:
            assert re.search(r"engine_build=|x86_64, and the host is aarch64|needs glibc 2\.35", why), why
            with pytest.raises(UserError, match=f"transfer_backend is {backend}, and of {chosen}'s wheels {re.escape(why)}"):
                transfer.needs(there, build, ALL, backend, {})
            continue
        needed = transfer.needs(there, build, ALL, backend, {})
        files = {step: text(step) for step in needed.steps}
        transfer.check_files("n1", files)
        names = [name for step in files for name in transfer._named(files[step])]
        found = [name for name in names if name.startswith(("nixl-", "mooncake", "memfabric"))]
        assert chosen is None or any(name.startswith(chosen) for name in found), (needed.steps, backend)
        for name in found:
            assert ("efa" in name) == (efa and "mooncake" in name), found
            assert ("npu" in name or "memfabric" in name) == (build == "npu"), found
            if build in ("cuda12", "cuda13"):
                assert ("cuda13" in name or "cu13" in name) == (build == "cuda13"), found


def test_every_file_is_pinned_with_hashes_and_locked_by_the_tool() -> None:
    files = [*(REPO / "requirements").glob("transfer-*.txt"), REPO / "requirements/nixl-build.txt"]
    used = {f"{name}.txt" for name in transfer._FILES.values()} | {Path(transfer.SHIM).name, Path(transfer.BUILD_TOOLS).name}
    assert {path.name for path in files} == used
    for path in files:
        rows = [line for line in path.read_text().splitlines() if re.match(r"\w", line)]
        assert rows
        assert all(re.match(r"[\w.-]+==\S+ ", row) and row.endswith("\\") for row in rows), path
        assert path.with_suffix(".in").is_file()


def test_our_locks_get_cuda_13_and_files_of_the_user_s_what_he_says() -> None:
    made = plan(TWO, "1p1d", **SGLANG)
    assert installed(made) == ["engine-sglang-0.5.23", "transfer-nixl-cu13", "transfer-mooncake-cuda13"]
    own = {**SGLANG, "engine_requirements": ["requirements/mine.txt"]}
    assert installed(plan(TWO, "1p1d", **own)) == ["mine"], "nothing is known of them"
    assert installed(plan(TWO, "1p1d", **own, engine_build="cuda12")) == [
        "mine",
        "transfer-nixl-cu12",
        "transfer-mooncake-cuda12",
    ]
    vllm = {"engine": "vllm", "model": "m", "router": "vllm-router"}
    assert installed(plan(TWO, "1p1d", **vllm)) == ["engine-vllm-0.33.0", "transfer-nixl-cu13"]


def test_changing_the_backend_or_the_ratio_installs_nothing() -> None:
    wanted = [
        installed(plan(TWO, ratio, **SGLANG, transfer_backend=b))
        for b in ("nixl", "mooncake", "auto")
        for ratio in ("1p1d", "agg")
    ]
    assert all(files == wanted[0] for files in wanted)


def test_efa_is_found_where_there_is_no_other_card() -> None:
    efa = {"driver": "efa", "state": "ACTIVE"}
    mlx = {"driver": "mlx5_core", "state": "ACTIVE"}
    assert transfer.has_efa({"rdmap0": efa})
    assert not any(
        transfer.has_efa(cards) for cards in (None, {}, {"rdmap0": efa, "mlx5_0": mlx}, {"rdmap0": {**efa, "state": "DOWN"}})
    )
    made = plan(TWO, "1p1d", prefill=["n1"], decode=["n2"], **SGLANG, transfer_backend="mooncake", mooncake_protocol="efa")
    assert installed(made)[-1] == "transfer-mooncake-efa-cuda13"
    assert env_of(made, "prefill-0")["MOONCAKE_PROTOCOL"] == "efa"
    assert "MC_FORCE_TCP" not in env_of(made, "prefill-0")
    assert {pair["expected_transport"] for pair in made["pairs"]} == {"rdma"}
    arm = {"n1": {"python": {"version": "3.11.2", "machine": "aarch64", "glibc": "2.36", "path": "p"}}}
    with pytest.raises(UserError, match=r"host n1: transfer_backend is mooncake.*for EFA is for x86_64, and the host is aarch64"):
        plan(TWO, "1p1d", discovered=arm, **SGLANG, transfer_backend="mooncake", mooncake_protocol="efa")


def test_npus_take_engines_of_their_own() -> None:
    with pytest.raises(UserError, match="n1: its workers use NPUs, and the engine's virtualenv is built for cuda13"):
        plan(TWO, "1p1d", **SGLANG, transfer_backend="ascend")
    own = {**SGLANG, "engine_requirements": ["requirements/npu.txt"], "engine_build": "npu"}
    made = plan(TWO, "1p1d", **own, transfer_backend="ascend", ascend_mf_store_url="tcp://127.0.0.1:24667")
    assert installed(made) == ["npu", "transfer-mooncake-npu", "transfer-memfabric"]
    assert env_of(made, "decode-0")["ASCEND_MF_STORE_URL"] == "tcp://127.0.0.1:24667"
    with pytest.raises(UserError, match="of nixl's wheels there is none for engine_build=npu"):
        plan(TWO, "1p1d", **own, transfer_backend="nixl")


def test_mooncake_on_ascend_is_told_the_npu_of_each_worker() -> None:
    own = {**SGLANG, "runtime": "existing", "engine_python": "/opt/s", "ascend_transfer_with_mooncake": True}
    made = plan({"n1": host(1)}, "1p2d", **own, transfer_backend="mooncake")
    seen = {w["name"]: w["ranks"][0] for w in made["workers"]}
    assert {rank["env"]["ASCEND_NPU_PHY_ID"] for rank in seen.values()} == {"0", "1", "2"}
    for rank in seen.values():
        assert rank["env"]["ASCEND_RT_VISIBLE_DEVICES"] == rank["env"]["ASCEND_NPU_PHY_ID"] == str(rank["gpus"][0])
        assert "CUDA_VISIBLE_DEVICES" not in rank["env"]
    with pytest.raises(UserError, match="NPUs 2 and 3, and Mooncake on Ascend takes one NPU a worker"):
        plan({"n1": host(1)}, "1p1d", **own, transfer_backend="mooncake", tensor_parallel_size=2)


# ---------------------------------------------------------------- two builds in one place


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {"no-deps:a.txt": "nixl-cu12==1.5.1\nnixl_cu13==1.5.1\n"},
            r"2 builds of nixl: nixl-cu12 \(a.txt\) and nixl-cu13 \(a.txt\)",
        ),
        ({"a.txt": "nixl==1.5.1\n"}, r"nixl-cu12 \(nixl in a.txt\) and nixl-cu13"),
        (
            {"a.txt": "mooncake-transfer-engine==0.3.13\n", "b.txt": "Mooncake_Transfer.Engine-CUDA13==0.3.14 \\\n  --hash=x\n"},
            r"2 builds of mooncake: mooncake-transfer-engine \(a.txt\) and mooncake-transfer-engine-cuda13 \(b.txt\)",
        ),
    ],
)
def test_two_builds_of_one_engine_are_refused_before_they_are_installed(files: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=f"host n1: .*{says}"):
        transfer.check_files("n1", files)


def test_one_build_of_each_is_fine() -> None:
    transfer.check_files("n1", {"no-deps:a.txt": "nixl==1.5.1\nnixl-cu13==1.5.1\nmooncake-transfer-engine-non-cuda==0.3\n"})
    assert transfer.doubled(["nixl", "nixl-cu13", "mooncake", "mooncake-utils", "mooncake-transfer-engine"]) == {}
    for version in ("0.5.17", "0.5.23"):
        row = next(
            r for r in plan(TWO, "1p1d", **SGLANG, engine_version=version)["hosts"]["n1"]["installs"] if "sglang-0" in r["name"]
        )
        transfer.check_files("n1", {step: text(step) for step in row["requirements"]})


# ---------------------------------------------------------------- the system


def test_the_system_is_asked_for_what_the_chosen_engine_links(tmp_path: Path) -> None:
    def packages(backend: str, **own: Any) -> set[str]:
        made = plan(TWO, "1p1d", **{**SGLANG, "transfer_backend": backend, **own})
        return {row["package"] for row in made["hosts"]["n1"].get("transfer", {}).get("system", [])}

    assert packages("nixl") == set(), "its wheel brings UCX and libibverbs"
    assert packages("mooncake") == {"libibverbs1", "libnuma1", "libcurl4", "ibverbs-providers"}
    own = {"runtime": "existing", "engine_python": "/opt/x/bin/python", "engine_args": {"device": "cpu"}}
    assert packages("mooncake_tcp", **own) == {"libibverbs1", "libnuma1", "libcurl4"}, "without CUDA it links no card's driver"
    assert packages("nixl", nixl_backend="LIBFABRIC") == {"libfabric1", "libhwloc15"}
    assert packages("mooncake", runtime="docker", engine_image="a/b:1@sha256:" + "0" * 64) == set(), "an image has its own"
    rdma = {"n1": host(1, rdma_fabric="infiniband", rdma_devices=["mlx5_0"], tcp_device="eth0")}
    made = plan(rdma, "1p1d", **SGLANG, transfer_backend="nixl")
    assert {row["package"] for row in made["hosts"]["n1"]["transfer"]["system"]} == {
        "ibverbs-providers",
        "librdmacm1",
        "rdma-core",
    }
    assert "transfer" not in plan(TWO, "1p1d")["hosts"]["n1"], "an emulated engine opens nothing"


def test_what_is_missing_is_named_as_the_host_names_it(tmp_path: Path) -> None:
    rows = [
        {"package": "libc6", "rpm": "glibc", "shows": ["lib:libc.so.6"]},
        {"package": "libibverbs1", "rpm": "libibverbs", "shows": ["lib:libnone.so.9", "run:no-such-program"]},
        {"package": "rdma-core", "rpm": "rdma-core", "shows": ["file:/none", "file:/usr/lib*/x/rename"]},
    ]
    assert transfer_host.missing(rows, tmp_path) == ["libibverbs1", "rdma-core"]
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('NAME=x\nID_LIKE="rhel fedora"\n')
    (tmp_path / "usr/lib64/x/rename").mkdir(parents=True)
    assert transfer_host.missing(rows, tmp_path) == ["libibverbs"]


# ---------------------------------------------------------------- NIXL from source


def test_nixl_is_built_where_its_sources_are_named() -> None:
    made = plan(TWO, "1p1d", **SGLANG, nixl_source="/src/nixl/", ucx_prefix="/opt/ucx")
    rows = {row["name"]: row for row in made["hosts"]["n1"]["installs"]}
    assert installed(made) == ["engine-sglang-0.5.23", "transfer-nixl", "transfer-mooncake-cuda13"]
    assert rows["sglang-0.5.23"]["source"] == {"path": "/src/nixl", "ucx": "/opt/ucx", "name": "nixl-cu13", "tools": "nixl-build"}
    names = list(rows)
    assert names.index("nixl-build") < names.index("sglang-0.5.23"), "it is waited for"
    assert {row["package"] for row in made["hosts"]["n1"]["transfer"]["system"]} >= {"g++", "pkg-config", "cmake"}


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"nixl_source": "/src/nixl"}, "ucx_prefix=None: NIXL is built from source with nixl_source and ucx_prefix"),
        ({"nixl_source": "src", "ucx_prefix": "/opt/ucx"}, "nixl_source='src'.*absolute paths"),
        ({"nixl_source": "/s", "ucx_prefix": "/a b"}, "no spaces"),
        (
            {"nixl_source": "/s", "ucx_prefix": "/u", "engine_requirements": ["x.txt"]},
            "engine_build is auto, and engine_requirements are",
        ),
        ({"nixl_source": "/s", "ucx_prefix": "/u", "runtime": "existing", "engine_python": "/p"}, "runtime is not venv"),
        (
            {"nixl_source": "/s", "ucx_prefix": "/u", "runtime": "docker", "engine_image": "a/b:1@sha256:" + "0" * 64},
            "runtime is not venv",
        ),
    ],
)
def test_sources_that_cannot_be_built_are_refused(own: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"host n1: .*{says}"):
        plan(TWO, "1p1d", **{**SGLANG, **own})


# ---------------------------------------------------------------- what they are told

#: A value of each type that is no default of any of them.
_VALUES = {"str": "x", "int": 7, "float": 7.5, "bool": True, "dict": {"b": 1, "a": "x"}}


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_every_variable_becomes_its_environment_variable_for_those_who_read_it(knob: Any) -> None:
    row = VARIABLES[knob.name]
    assert (row.env, row.otherwise, row.default) == (knob.env, knob.default, None)
    value = knob.choices[0] if knob.choices else _VALUES[knob.type]
    typed = settings.convert(row, value, "test")
    backends = knob.backends or ("nixl",)
    for role, engine, backend in itertools.product(("prefill", "decode", "aggregated"), engines.ENGINES, (*ALL, "none")):
        told = transfer.environment({knob.name: typed}, engine, role, backend)
        reads = role in knob.roles and engine in knob.engines and (not knob.backends or backend in backends)
        assert set(told) == ({knob.env} if reads else set()), (role, engine, backend)
        if reads:
            shown = {"x": "x", 7: "7", 7.5: "7.5", True: "1" if knob.present else "true"}
            assert told[knob.env] == ('{"a": "x", "b": "1"}' if knob.type == "dict" else shown.get(value, value))
    assert transfer.environment({knob.name: None}, "sglang", knob.roles[0], backends[0]) == {}
    if knob.present:
        assert transfer.environment({knob.name: False}, "sglang", "prefill", backends[0]) == {}, "it would count as true"
    if knob.choices:
        with pytest.raises(UserError, match="one of"):
            settings.convert(row, "no-such", "test")


def test_names_are_those_of_the_field_and_none_is_twice() -> None:
    assert len({knob.env for knob in KNOBS}) == len({knob.name for knob in KNOBS}) == len(KNOBS)
    page = (REPO / "docs" / "variables.md").read_text()
    for knob in KNOBS:
        assert re.search(rf"\| `{knob.name}` \|.*`{knob.env}`", page), f"{knob.name}: make docs"
        if knob.name.startswith("disaggregation_"):
            assert knob.env.removeprefix("SGLANG_").replace("DISAGG_", "DISAGGREGATION_").lower() == knob.name


def test_one_host_s_values_reach_exactly_its_workers_of_that_role() -> None:
    hosts = {n: host(i, 1) for i, n in enumerate(("n1", "n2", "n3", "n4"), 1)}
    before = plan(hosts, "2p2d", prefill=["n1", "n2"], decode=["n3", "n4"], **SGLANG)
    own = {"disaggregation_queue_size": 2, "disaggregation_waiting_timeout": 600}
    after = plan(
        {**hosts, "n2": {**hosts["n2"], **own}, "n3": {**hosts["n3"], **own}},
        "2p2d",
        prefill=["n1", "n2"],
        decode=["n3", "n4"],
        **SGLANG,
    )
    changed = {}
    for old, new in zip(before["workers"], after["workers"], strict=True):
        told = {k: v for k, v in new["ranks"][0]["env"].items() if old["ranks"][0]["env"].get(k) != v}
        changed.update({new["ranks"][0]["host"]: told} if told else {})
        assert new["ranks"][0]["argv"] == old["ranks"][0]["argv"]
    assert changed == {
        "n2": {"SGLANG_DISAGGREGATION_QUEUE_SIZE": "2"},
        "n3": {"SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "600"},
    }


def test_mooncake_over_nvlink_is_expected_to_be_seen_there() -> None:
    inside = {"mooncake_intranode_nvlink": True, "mooncake_custom_mem_pool": "INTRA_NODE_NVLINK"}
    made = plan({"n1": host(1)}, "1p1d", **SGLANG, transfer_backend="mooncake", **inside)
    env = env_of(made, "decode-0")
    assert (env["MC_INTRANODE_NVLINK"], env["SGLANG_MOONCAKE_CUSTOM_MEM_POOL"]) == ("1", "INTRA_NODE_NVLINK")
    assert [pair["expected_transport"] for pair in made["pairs"]] == ["cuda_ipc"]
    assert "MC_FORCE_TCP" not in env
    across = {"mooncake_force_mnnvl": True, "mooncake_custom_mem_pool": "NVLINK"}
    made = plan(TWO, "1p1d", prefill=["n1"], decode=["n2"], **SGLANG, transfer_backend="mooncake", **across)
    assert [pair["expected_transport"] for pair in made["pairs"]] == ["cuda_ipc"]
    assert "MC_FORCE_TCP" not in env_of(made, "prefill-0")
    assert "SGLANG_MOONCAKE_CUSTOM_MEM_POOL" not in env_of(
        plan(TWO, "1p1d", **SGLANG, transfer_backend="nixl", **across), "prefill-0"
    )


def test_nixl_s_plugins_and_their_parameters() -> None:
    own = {"nixl_backend": "LIBFABRIC", "nixl_backend_params": {"num_threads": 4}, "nixl_plugin_dir": "/opt/plugins"}
    made = plan({"n1": host(1)}, "1p1d", **SGLANG, transfer_backend="nixl", **own)
    env = env_of(made, "prefill-0")
    assert env["SGLANG_DISAGGREGATION_NIXL_BACKEND"] == "LIBFABRIC"
    assert json.loads(env["SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS"]) == {"num_threads": "4"}, "SGLang takes text only"
    assert env["NIXL_PLUGIN_DIR"] == "/opt/plugins"
    assert made["pairs"][0]["expected_transport"] == "tcp", "cuda_ipc is UCX's"


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"nixl_backend": "LIBFABRICS"}, "nixl_backend='LIBFABRICS': one of UCX.*did you mean LIBFABRIC"),
        ({"disaggregation_thread_pool_size": 2}, "disaggregation_thread_pool_size=2 is less than disaggregation_queue_size=4"),
        (
            {"disaggregation_queue_size": 2, "prefill_engine_env": {"SGLANG_DISAGGREGATION_QUEUE_SIZE": 8}},
            "disaggregation_queue_size=2 and SGLANG_DISAGGREGATION_QUEUE_SIZE in prefill_engine_env say the same",
        ),
        ({"mooncake_custom_mem_pool": "NVLNK"}, "mooncake_custom_mem_pool='NVLNK'.*did you mean NVLINK"),
        ({"disaggregation_heartbeat_max_failure": 0}, "at least 1"),
        ({"nixl_backend_params": "num_threads=8"}, "expected a mapping"),
        (
            {"engine": "vllm", "router": "vllm-router", "nixl_backend": "UCX"},
            "nixl_backend is read by sglang, and engine is vllm",
        ),
    ],
)
def test_a_wrong_value_is_refused_before_a_host_is_touched(own: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Planner(inputs(TWO, "1p1d", **{**SGLANG, **own})).check_flags()


def test_a_plugin_of_one_s_own_needs_its_folder() -> None:
    made = make_plan(inputs(TWO, "1p1d", **SGLANG, transfer_backend="nixl", nixl_backend="MINE", nixl_plugin_dir="/opt/p"))
    assert env_of(made, "decode-0")["SGLANG_DISAGGREGATION_NIXL_BACKEND"] == "MINE"


# ---------------------------------------------------------------- an environment that is there


def environment(folder: Path, *distributions: str) -> dict[str, Any]:
    """A Python with SGLang and ``distributions``, as `runtime: existing` finds it: this one, with packages of our own first."""
    for name, version in (("sglang", "0.5.23"), *((name, "1.0") for name in distributions)):
        about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "sglang").mkdir()
    (folder / "sglang/__init__.py").write_text("")
    return {"python": sys.executable, "package": "sglang", "version": "0.5.23", "env": {"PYTHONPATH": str(folder)}}


def test_an_environment_with_two_builds_is_told_of(tmp_path: Path) -> None:
    fine = environment(tmp_path / "a", "nixl", "nixl-cu13", "mooncake-transfer-engine-cuda13")
    assert images.check_existing(fine, "") == ""
    both = environment(tmp_path / "b", "nixl", "nixl-cu12", "nixl-cu13")
    assert "has 2 builds of nixl (nixl-cu12 and nixl-cu13)" in images.check_existing(both, ""), "it works: the shim chooses"
    broken = environment(tmp_path / "c", "mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda")
    with pytest.raises(
        UserError, match=r"2 builds of mooncake.*-m pip uninstall mooncake-transfer-engine mooncake-transfer-engine-non"
    ):
        images.check_existing(broken, "")
