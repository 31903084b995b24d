"""The KV path probe: which paths are tried and when again, what a log says of the transport, and what is made of a fault."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.plans import host, plan

from pdlib import probe, probe_host, probe_verdict

Json = dict[str, Any]
SGLANG = {"engine": "sglang", "model": "m", "transfer_backend": "nixl"}


def cluster(hosts: int, ratio: str, tp: int = 1, gpus: int = 8, **options: Any) -> Json:
    names = {f"n{number}": host(number, gpus, tcp_device="eth0") for number in range(1, hosts + 1)}
    return plan(names, ratio, tensor_parallel_size=tp, **{**SGLANG, **options})


def work(made: Json, before: Json | None = None, mode: str = "auto", hosts: set[str] | None = None, **locks: str) -> Json:
    todo: Json = probe.work(made, before, mode, hosts, locks, reads=False)
    return todo


def done(todo: Json) -> Json:
    """The record of a probe in which all was well."""
    return {**todo["known"], **{pair["fingerprint"]: {"gb_s": 1.0} for pair in todo["pairs"]}}


# ---------------------------------------------------------------- which


@st.composite
def clusters(draw: st.DrawFn) -> Json:
    hosts, tp = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4]))
    room = hosts * (8 // tp)
    prefill = draw(st.integers(1, max(1, room // 2)))
    decode = draw(st.integers(1, max(1, room - prefill)))
    return cluster(hosts, f"{prefill}p{decode}d", tp)


@given(clusters())
def test_every_path_between_hosts_is_tried_with_every_gpu_of_theirs(made: Json) -> None:
    by_worker = probe.ends(made, {})
    rows = probe.pairs(made, by_worker)
    tried = [(row["prefill"]["id"], row["decode"]["id"]) for row in rows]
    assert len(tried) == len(set(tried))
    for pair in made["pairs"]:
        left, right = by_worker[pair["prefill"]], by_worker[pair["decode"]]
        between = [r for r in rows if r["prefill"]["host"] == left[0]["host"] and r["decode"]["host"] == right[0]["host"]]
        assert {end["id"] for end in left} <= {row["prefill"]["id"] for row in between}
        assert {end["id"] for end in right} <= {row["decode"]["id"] for row in between}
        if left[0]["host"] == right[0]["host"]:
            assert {(a["id"], b["id"]) for a, b in zip(left, right, strict=True)} <= set(tried)
        else:
            ends = {row["prefill"]["id"] for row in between} | {row["decode"]["id"] for row in between}
            assert len(between) < len(ends)
    # GPU i of one is with GPU i of the other, as the ranks of tensor parallel workers are
    assert all(row["prefill"]["slot"] == row["decode"]["slot"] for row in rows)


@given(clusters())
def test_each_path_has_one_end_that_waits_and_one_that_comes(made: Json) -> None:
    todo = work(made)
    waiting = {end for names in todo["waiting"].values() for end in names}
    moving = {end for names in todo["moving"].values() for end in names}
    assert {pair["to"] for pair in todo["pairs"]} == waiting
    assert {pair["from"] for pair in todo["pairs"]} == moving
    served = {end: {"port": 1, "token": "t"} for end in waiting}
    tasks = [row for name in todo["moving"] for row in probe.tasks(todo, name, "moving", served)]
    assert sorted(pair["id"] for row in tasks for pair in row["task"]["pairs"]) == sorted(pair["id"] for pair in todo["pairs"])


def test_nobody_comes_to_an_end_that_does_not_wait() -> None:
    todo = work(cluster(3, "1p2d", tp=8, prefill=["n1"], decode=["n2", "n3"]))
    here = {"port": 1, "token": "t"}
    to = [pair["to"] for pair in todo["pairs"]]
    assert len(to) == len(set(to)) == 16
    some = probe.tasks(todo, "n1", "moving", {to[0]: here, to[1]: here})
    assert [len(row["task"]["pairs"]) for row in some] == [1, 1]
    assert probe.tasks(todo, "n1", "moving", {}) == []


def test_workers_of_different_size_meet_gpu_by_gpu() -> None:
    made = cluster(2, "1p1d", prefill_tensor_parallel_size=2, decode_tensor_parallel_size=4, prefill=["n1"], decode=["n2"])
    rows = probe.pairs(made, probe.ends(made, {}))
    assert [(row["prefill"]["gpu"], row["decode"]["gpu"]) for row in rows] == [(0, 0), (0, 1), (1, 2), (1, 3)]


def test_every_rank_of_a_worker_of_several_hosts_is_an_end() -> None:
    made = cluster(4, "1p1d", tp=16, nodes_per_worker=2)
    hosts = {(row["prefill"]["host"], row["decode"]["host"]) for row in probe.pairs(made, probe.ends(made, {}))}
    assert hosts == {("n1", "n3"), ("n2", "n4")}


def test_on_cpus_workers_of_one_host_share_an_end() -> None:
    made = cluster(2, "3p2d", engine_args={"device": "cpu"}, prefill=["n1"], decode=["n2"])
    todo = work(made)
    assert len(todo["pairs"]) == 1
    end = todo["ends"][todo["pairs"][0]["prefill"]]
    assert end["workers"] == ["prefill-0", "prefill-1", "prefill-2"]
    assert (end["gpu"], end["slot"]) == (None, None)
    assert probe.label(end) == "prefill-0 to prefill-2 (n1)"


def test_decode_comes_where_it_fetches() -> None:
    todo = probe.work(cluster(2, "1p1d", prefill=["n1"], decode=["n2"]), None, "auto", None, {}, reads=True)
    assert (todo["op"], list(todo["waiting"]), list(todo["moving"])) == ("read", ["n1"], ["n2"])


# ---------------------------------------------------------------- when


@pytest.mark.parametrize(
    ("options", "ratio", "why"),
    [
        ({"engine": "emulated", "model": None, "transfer_backend": "auto"}, "1p1d", "emulated engine has no transfer engine"),
        ({}, "2agg", "aggregated workers move no KV cache"),
        (
            {"transfer_backend": "ascend", "runtime": "existing", "engine_python": "/opt/sglang"},
            "1p1d",
            "it moves nothing between NPUs",
        ),
    ],
)
def test_what_cannot_be_tried_is_said(options: Json, ratio: str, why: str) -> None:
    todo = work(cluster(1, ratio, **options))
    assert todo["pairs"] == []
    assert why in todo["says"]


def test_never_is_said() -> None:
    todo = work(cluster(1, "1p1d"), mode="never")
    assert (todo["pairs"], todo["says"]) == ([], "KV path probe: none (kv_probe is never)")


def test_a_deployment_that_does_not_change_is_not_tried_again() -> None:
    made = cluster(2, "3p1d")
    known = done(work(made))
    again = work(made, known)
    assert again["pairs"] == [] == list(again["waiting"])
    assert again["known"] == known
    assert "are known" in again["says"]
    # over JSON, as the deployed plan is kept
    assert work(json.loads(json.dumps(made)), json.loads(json.dumps(known)))["pairs"] == []


@pytest.mark.parametrize("mode", ["always", "report"])
def test_always_is_always(mode: str) -> None:
    made = cluster(2, "3p1d")
    assert len(work(made, done(work(made)), mode)["pairs"]) == len(work(made)["pairs"]) > 0


@pytest.mark.parametrize(
    "change",
    [
        {"engine_env": {"UCX_TLS": "rc"}},
        {"engine_env": {"MC_GID_INDEX": "3"}},
        {"transfer_backend": "mooncake"},
        {"engine_version": "0.5.17"},
        {"install_dir": "/elsewhere"},
        {"tcp_device": "eth1"},
    ],
)
def test_what_a_path_hangs_on_makes_it_new(change: Json) -> None:
    names = {f"n{number}": host(number, 8) for number in (1, 2)}
    made = plan(names, "1p1d", **{**SGLANG, "tcp_device": "eth0"})
    todo = work(plan(names, "1p1d", **{**SGLANG, "tcp_device": "eth0", **change}), done(work(made)))
    assert len(todo["pairs"]) == 1
    assert todo["known"] == {}


def test_requirements_make_a_path_new() -> None:
    made = cluster(2, "1p1d", prefill=["n1"], decode=["n2"])
    known = done(work(made, n1="one", n2="two"))
    assert work(made, known, n1="one", n2="two")["pairs"] == []
    assert len(work(made, known, n1="one", n2="three")["pairs"]) == 1


@pytest.mark.parametrize("change", [{"engine_env": {"HF_HOME": "/x"}}, {"mem_fraction": 0.5}, {"worker_port_base": 40000}])
def test_what_no_path_hangs_on_does_not(change: Json) -> None:
    known = done(work(cluster(2, "1p1d")))
    assert work(cluster(2, "1p1d", **change), known)["pairs"] == []


def test_only_new_paths_are_tried() -> None:
    known = done(work(cluster(3, "1p1d", prefill=["n1"], decode=["n2", "n3"], tp=8)))
    todo = work(cluster(3, "1p2d", prefill=["n1"], decode=["n2", "n3"], tp=8), known)
    assert {(todo["ends"][p["prefill"]]["host"], todo["ends"][p["decode"]]["host"]) for p in todo["pairs"]} == {("n1", "n3")}
    assert todo["known"] == known


def test_hosts_that_limit_leaves_out_are_left_alone() -> None:
    made = cluster(2, "1p1d", prefill=["n1"], decode=["n2"])
    todo = work(made, hosts={"n1"})
    assert todo["pairs"] == []
    assert "1 have an end that --limit leaves out" in todo["says"]


# ---------------------------------------------------------------- what was seen

NOTHING: list[str] = []
CUDA = "remote memory write by ucp_put* from cuda/GPU0 memory to cuda/GPU1"
HOST = "remote memory write by ucp_put* from host memory to host"


@pytest.mark.parametrize(
    ("backend", "gpu", "lines", "expected"),
    [
        ("nixl", False, [f"UCX inter-node: {HOST}: 0..inf: zero-copy: tcp/eth0"], ("tcp", "eth0")),
        ("nixl", False, [f"UCX intra-node: {HOST}: 0..inf: zero-copy: cma/memory"], ("shm", "memory")),
        ("nixl", True, [f"UCX intra-node: {CUDA}: 0..inf: zero-copy: cuda_ipc/cuda"], ("cuda_ipc", "cuda")),
        (
            "nixl", True,
            [f"UCX inter-node: {CUDA}: 4096..inf: zero-copy: 50% on rc_mlx5/mlx5_0:1 and 50% on rc_mlx5/mlx5_1:1"],
            ("rdma", "mlx5_0:1,mlx5_1:1"),
        ),
        ("nixl", True, [f"UCX inter-node: {CUDA}: 0..inf: software emulation: cuda_copy/cuda and tcp/eth0"], ("tcp", "eth0")),
        # what the agent has with itself, and with memory of another kind, says nothing of the path
        ("nixl", True, [f"UCX self: {CUDA}: 0..inf: zero-copy: cuda_ipc/cuda"], ("", "")),
        (
            "nixl", True,
            [f"UCX inter-node: {CUDA}: 0..inf: zero-copy: rc_mlx5/mlx5_0:1", f"UCX inter-node: {HOST}: 0..inf: x: tcp/eth0"],
            ("rdma", "mlx5_0:1"),
        ),
        ("nixl", False, NOTHING, ("", "")),
        ("mooncake", True, ["I x.cpp:1] Using Intra-Node NVLink transport (MC_INTRANODE_NVLINK set)"], ("cuda_ipc", "")),
        ("mooncake", True, ["I x.cpp:1] Using TCP transport (no HCA detected)"], ("tcp", "")),
        ("mooncake", True, ["I x.cpp:1] MC_FORCE_TCP is set, using TCP transport only"], ("tcp", "")),
        ("mooncake", False, ["I tcp_transport.cpp:391] TcpTransport: listen on port 15353"], ("tcp", "")),
        ("mooncake", True, ["I x.cpp:1] Using RDMA transport (RoCE/iWARP)"], ("rdma", "")),
        ("mooncake", True, ["I x.cpp:1] installTransport, type=rdma"], ("rdma", "")),
        ("mooncake", True, ["I x.cpp:1] Using RDMA transport for RPC communication"], ("", "")),
        ("mooncake_tcp", True, NOTHING, ("", "")),
    ],
)  # fmt: skip
def test_the_transport_is_read_from_the_log(backend: str, gpu: bool, lines: list[str], expected: tuple[str, str]) -> None:
    assert probe_verdict.seen(backend, "write", gpu, lines) == expected


def test_reads_that_ucx_makes_of_messages_go_where_writes_go() -> None:
    lines = ["UCX inter-node: active message by ucp_am_send*(multi) from host memory: 8185..inf: zero-copy: tcp/lo"]
    assert probe_verdict.seen("nixl", "read", False, lines) == ("tcp", "lo")


# ---------------------------------------------------------------- what it means


def judged(result: Json, expected: str = "tcp", backend: str = "nixl", hosts: tuple[str, str] = ("n1", "n2")) -> Json:
    ends = {
        name: {"host": where, "address": f"127.0.0.{number}", "python": "/opt/pd/bin/python", "gpu": 2}
        for number, (name, where) in enumerate(zip(("p", "d"), hosts, strict=True), 1)
    }
    return probe_verdict.judge(
        {"backend": backend, "op": "write", "ends": ends}, {"from": "p", "to": "d", "expected": expected}, {**FINE, **result}
    )


FINE: Json = {
    "kind": "", "error": "", "there": False, "stage": "compares the contents", "evidence": [], "evidence_there": [],
    "gb_s": 2.0, "latency_us": 9.0, "bytes": 64, "transfers": 3, "memory": "DRAM", "sha256_sent": "ab", "sha256_received": "ab",
    "versions": {}, "versions_there": {},
}  # fmt: skip
VRAM_TCP = {"memory": "VRAM", "evidence": [f"UCX inter-node: {CUDA}: 0..inf: x: cuda_copy/cuda and tcp/eth0"]}


def test_all_is_well() -> None:
    said = judged({"evidence": [f"UCX inter-node: {HOST}: 0..inf: zero-copy: tcp/eth0"]})
    assert (said["ok"], said["finding"], said["seen"], said["gb_s"]) == (True, "", "tcp", 2.0)


def test_a_log_that_does_not_tell_is_no_finding() -> None:
    assert judged({})["ok"]


@pytest.mark.parametrize(
    ("expected", "hosts", "fix"), [("rdma", ("n1", "n2"), "ibv_devinfo"), ("cuda_ipc", ("n1", "n1"), "UCX_TLS")]
)
def test_another_transport_is_a_finding(expected: str, hosts: tuple[str, str], fix: str) -> None:
    said = judged(VRAM_TCP, expected, hosts=hosts)
    assert not said["ok"]
    assert said["finding"].startswith("the bytes went by TCP (eth0), and ")
    assert fix in said["fix"]


def test_shared_memory_serves_two_workers_of_one_host_on_its_cpus() -> None:
    lines = {"evidence": [f"UCX intra-node: {HOST}: 0..inf: zero-copy: cma/memory"]}
    assert judged(lines, "tcp", hosts=("n1", "n1"))["ok"]
    assert not judged(lines, "tcp")["ok"]
    assert not judged(lines, "rdma", hosts=("n1", "n1"))["ok"]


@pytest.mark.parametrize(
    ("lines", "fix"),
    [
        (["W topology.cpp:201] No RDMA devices found, check", "I x] Using TCP transport (no HCA detected)"], "ibv_devices"),
        (["I x] MC_FORCE_TCP is set, using TCP transport only"], "take MC_FORCE_TCP out"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["evidence", "evidence_there"])
def test_mooncake_that_falls_back_at_either_end_is_a_finding(lines: list[str], fix: str, where: str) -> None:
    rdma = ["I x] Using RDMA transport (RoCE/iWARP)"]
    said = judged({"evidence": rdma, "evidence_there": rdma, where: lines}, "rdma", "mooncake")
    assert (said["ok"], said["seen"]) == (False, "tcp")
    assert fix in said["fix"]


def test_other_contents_are_a_finding_however_fast() -> None:
    said = judged({"sha256_received": "cd"})
    assert not said["ok"]
    assert said["gb_s"] is None
    assert "ab was sent and cd arrived" in said["finding"]


MISSING = "ucp_context.c:1508 UCX WARN network device 'mlx5_7:1' is not available, please use one or more of: 'eth0'(tcp)"


@pytest.mark.parametrize(
    ("result", "cause", "fix"),
    [
        (probe_verdict.not_started("/x: No such file", True), "could not be started on n2", "engine_python"),
        ({"kind": "name"}, "does not resolve on n1", "address of n2"),
        ({"kind": "refused"}, "n2 rejects what comes from n1", "between n1 and n2"),
        ({"kind": "silence"}, "from n1 to 127.0.0.2 are dropped", "between n1 and n2"),
        ({"kind": "route"}, "n1 has no route to 127.0.0.2", "routes of n1"),
        ({"kind": "import", "there": True, "error": "ModuleNotFoundError: No module named 'nixl'"}, "on n2 has no NIXL", "nixl"),
        (
            {"kind": "import", "error": "libibverbs.so.1: cannot open shared object file"},
            "library is missing on n1: libibverbs.so.1", "apt-get install libibverbs1",
        ),
        ({"kind": "gpu", "error": "CUDA out of memory."}, "no room", "GPU 2 of n1"),
        ({"kind": "gpu", "error": "No CUDA GPUs are available"}, "cannot use GPU 2", "torch.zeros(1).cuda()"),
        ({"kind": "engine", "there": True, "evidence_there": [MISSING]}, "no device mlx5_7:1 on n2", "tcp_device of n2"),
        ({"kind": "engine", "evidence": ["E ibv_reg_mr failed"]}, "cannot be pinned", "memlock"),
        ({"kind": "engine", "evidence": ["no usable transports/devices"]}, "finds no device on n1", "UCX_NET_DEVICES"),
        ({"kind": "engine"}, "could not be set up on n1", "kv_probe.json"),
        ({"kind": "device"}, "leaves a GPU out", "rdma_devices of n1"),
        ({"kind": "transfer", "evidence": ["transport retry exceeded"]}, "GID index", "show_gids"),
        ({"kind": "transfer"}, "control connection works", "all TCP ports between n1 and n2"),
        ({"kind": "timeout"}, "NIXL hangs", "all TCP ports between n1 and n2"),
        ({"kind": "died", "there": True}, "crashed on n2", "kv_probe.json"),
        ({"kind": "ended", "there": True}, "went away", "deploy again"),
    ],
)  # fmt: skip
def test_a_fault_has_its_likely_cause_and_what_to_do(result: Json, cause: str, fix: str) -> None:
    said = judged({"error": "it failed", "stage": "waits", **result})
    assert not said["ok"]
    assert cause in said["cause"]
    assert fix in said["fix"]
    where = "n2" if result.get("there") else "n1"
    assert said["finding"].startswith(f"on {where}: ")


def test_paths_with_one_cause_stand_together() -> None:
    rows = [
        {"prefill": f"prefill-{n} (n1)", "decode": "decode-0 (n2)", "finding": "it failed", "cause": cause, "fix": "do it",
         "addresses": {"prefill": "127.0.0.1", "decode": "127.0.0.2"}}
        for n, cause in enumerate(["one", "two", "one"])
    ]  # fmt: skip
    text = probe_verdict.message(rows, 5)
    assert text.startswith("3 of 5 paths")
    assert text.count("likely cause: one") == text.count("likely cause: two") == 1
    for part in ("prefill-2 (n1) 127.0.0.1 -> decode-0 (n2) 127.0.0.2: it failed", "to do: do it", "kv_probe=report"):
        assert part in text


# ---------------------------------------------------------------- what is shown


def row(prefill: str, decode: str, gb_s: float | None = 1.0, ok: bool = True) -> Json:
    return {"prefill": prefill, "decode": decode, "gb_s": gb_s, "latency_us": 10.0, "ok": ok, "seen": "tcp"}


def test_the_matrix_has_prefill_downwards_and_decode_across() -> None:
    text = probe.matrix([row("p0", "d0", 43.21), row("p0", "d1", None, False), row("p1", "d1", 0.05, False)])
    assert text.splitlines()[2].startswith("p0  ")
    assert "43.2 GB/s 10 us" in text
    assert "BROKEN" in text
    assert "0.05 GB/s 10 us ! tcp" in text


def test_a_matrix_that_is_too_wide_says_which_is_slowest() -> None:
    text = probe.matrix([row("p0", f"d{n}", 10.0 - n * 0.1) for n in range(9)])
    assert "9.2 GB/s" in text
    assert "d8" in text
    assert max(map(len, text.splitlines())) < 100


# ---------------------------------------------------------------- in containers


def test_in_a_container_the_probe_has_the_worker_s_image_devices_and_environment_and_nothing_of_its_files() -> None:
    image = "lmsysorg/sglang:v0.5.23@sha256:" + "0" * 64
    mount = "type=bind,source=/opt/drivers,target=/opt/drivers"
    own = ["--privileged", "--mount", mount, "--entrypoint", "x", "--volume", "/a:/a"]
    options: Json = {"engine_image": image, "engine_env": {"UCX_TLS": "rc"}, "engine_container_args": own, "model": "/models/m"}
    todo = work(cluster(1, "1p1d", runtime="docker", **options))
    end = probe.tasks(todo, "n1", "waiting", {})[0]
    worker = end["container"]["argv"]
    argv = probe_host.in_container(worker, "python3", "kv-probe-x", "/work", "/work/probe_tool.py")
    assert argv[:2] == ["docker", "run"]
    assert argv[-4:] == ["--entrypoint", "python3", image, "/work/probe_tool.py"]
    assert argv[argv.index("--name") + 1] == "kv-probe-x"
    assert argv[argv.index("--workdir") + 1] == "/work"
    # of our folders the probe's alone; what the user adds, mounts among it, is as the worker has it
    assert "/models/m" in " ".join(worker)
    assert [argv[i + 1] for i, word in enumerate(argv) if word == "--mount"] == [mount, "type=bind,source=/work,target=/work"]
    assert argv[argv.index("--privileged") :][: len(own)] == own
    for word in ("--gpus", "UCX_TLS", "--interactive"):
        assert word in argv
