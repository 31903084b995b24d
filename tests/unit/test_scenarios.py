"""Every setup's inventory renders what its script meant: flag by flag, in the words of the current engine.

``scenarios.py`` holds the old commands. :func:`meant` says what each of their flags and variables
means to SGLang 0.5.23; a flag that it does not know is a failure. What a plan adds of its own stands in ``_ours`` alone.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from unit.scenarios import CASES, Case, Words

from pdlib import flags, settings, tables
from pdlib.variables import VARIABLES

REPO = Path(__file__).resolve().parents[2]
ANSIBLE = Path(sys.executable).with_name("ansible-playbook")
TABLES = {"sglang": flags.load("sglang", "0.5.23"), "vllm": flags.load("vllm", "0.33.0")}

Json = dict[str, Any]

#: What 0.5.23 has no more, reads no more, or takes with a warning that it is going: none of it may be rendered.
DEAD = {
    "--enable-deepep-moe", "--enable-dp-attention", "--dp-size", "--cuda-graph-bs", "--base-gpu-id",
    "SGLANG_NUM_RESERVED_DECODE_TOKENS", "sglang.srt.disaggregation.mini_lb", "disagg_proxy_p2p_nccl_xpyd.py",
}  # fmt: skip
#: Old flag -> (flag today, value today; "" keeps the old one).
RENAMED = {
    "--enable-deepep-moe": ("--moe-a2a-backend", "deepep"),
    # In the texts always beside --enable-dp-attention: groups of the attention, not replicas.
    "--dp-size": ("--attn-dp-size", ""),
    "--cuda-graph-bs": ("--cuda-graph-bs-decode", ""),
}
#: Old flags that say nothing by themselves, or that hold for nodes of a worker that has but one.
SILENT = {"--enable-dp-attention", "--base-gpu-id"}
ONE_NODE = {"--dist-init-addr", "--nnodes", "--node-rank"}
#: The connector that took the place of vLLM's P2pNcclConnector: either end may send and receive, and none computes a lost KV.
NIXL = '{"kv_connector":"NixlConnector","kv_load_failure_policy":"fail","kv_role":"kv_both"}'
#: Old variable -> the flag that took its place.
ENV_TO_FLAG = {"SGLANG_NUM_RESERVED_DECODE_TOKENS": "--num-reserved-decode-tokens"}

BY_NAME = {case.name: case for case in CASES}
RANKS = [(case.name, *rank) for case in CASES for rank in case.commands]


def typed(inventory: str, *more: str) -> tuple[subprocess.CompletedProcess[str], Json]:
    """Run ``plan.yml`` as a user types it; return how it ended, and the plan; the unit files are known to be beside it."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    with tempfile.TemporaryDirectory() as folder:
        command = [str(ANSIBLE), "plan.yml", "-i", f"inventory/{inventory}", *more, "-e", f"plan_dir={folder}"]
        done = subprocess.run(
            command, cwd=REPO, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=120
        )
        if done.returncode:
            return done, {}
        plan: Json = json.loads((Path(folder) / "plan.json").read_text())
        for unit in [plan["router"], *(rank for worker in plan["workers"] for rank in worker["ranks"])]:
            assert list((Path(folder) / unit["host"]).rglob(unit["unit"])), f"no {unit['unit']} for {unit['host']}"
    return done, plan


@functools.cache
def rendered(name: str) -> Json:
    """The plan of a case."""
    done, plan = typed(BY_NAME[name].inventory, *BY_NAME[name].typed)
    assert done.returncode == 0, done.stdout + done.stderr
    return plan


def rank_of(plan: Json, worker: str, number: int) -> Json:
    ranks: list[Json] = next(each["ranks"] for each in plan["workers"] if each["name"] == worker)
    assert [rank["node_rank"] for rank in ranks] == list(range(len(ranks)))
    return ranks[number]


def read(items: list[str]) -> Words:
    """Flag -> its value (several: with commas; a switch: "true"); what comes before the first flag is left out."""
    found: dict[str, list[str]] = {}
    flag = ""
    for item in items:
        if item.startswith("--"):
            flag = item
            assert flag not in found, f"{flag} twice"
            found[flag] = []
        elif flag:
            found[flag].append(item)
    return {flag: ",".join(values) or "true" for flag, values in found.items()}


def members(items: list[str]) -> list[list[str]]:
    """The router's workers in order: [role flag, URL, bootstrap port if any]."""
    found: list[list[str]] = []
    for item in items:
        if item.startswith("--"):
            found.append([item])
        elif found:
            found[-1].append(item)
    return [each for each in found if each[0] in ("--prefill", "--decode", "--worker-urls")]


def meant(command: str) -> tuple[Words, Words, list[int]]:
    """Return what an old server command means today: (flags, environment, GPUs)."""
    items = shlex.split(command)
    start = next(i for i, item in enumerate(items) if item.startswith(("python", "vllm")))
    env = dict(item.split("=", 1) for item in items[:start])
    lent = [int(gpu) for gpu in env.pop("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(16)))).split(",")]
    old = read(items[start:])
    if items[start] == "vllm":
        moved = {"--kv-transfer-config": NIXL} if "--kv-transfer-config" in old else {}
        return {"--tensor-parallel-size": "1", **old, **moved}, env, lent
    assert items[start + 1 : start + 3] == ["-m", "sglang.launch_server"]
    today: Words = {"--tp-size": "1", "--port": "30000"}
    if "--disaggregation-mode" in old:
        today["--disaggregation-transfer-backend"] = "mooncake"
    nodes = int(old.get("--nnodes", "1"))
    for flag, value in old.items():
        if flag in SILENT or (nodes == 1 and flag in ONE_NODE):
            continue
        name, fixed = RENAMED.get(flag, (flag, ""))
        assert name.lstrip("-") in TABLES["sglang"].flags, f"{flag}: say what it means today"
        today[name] = fixed or value
    for variable in ENV_TO_FLAG.keys() & env.keys():
        today[ENV_TO_FLAG[variable]] = env.pop(variable)
    first, gpus = int(old.get("--base-gpu-id", "0")), int(today["--tp-size"]) // nodes
    return today, env, lent[first : first + gpus]


def _ours(case: Case, rank: Json, role: str) -> tuple[Words, Words]:
    """What a plan adds to every server: (flags, environment)."""
    gpus = ",".join(map(str, rank["gpus"]))
    # The scripts left the order to CUDA, and meant nvidia-smi's.
    cuda = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpus}
    env = {"ASCEND_RT_VISIBLE_DEVICES": gpus} if case.backend == "ascend" else cuda
    if len(rank["gpus"]) > 1 and rank["rdma_devices"]:
        # The scripts left NCCL of one host every card, the masked one, too.
        env["NCCL_IB_HCA"] = "=" + ",".join(f"{device}:1" for device in rank["rdma_devices"])
    # Listening on the one address at which others reach the host, not on all and not on loopback.
    said = {"--host": rank["listen"]}
    if case.engine == "vllm":
        if role != "aggregated":
            env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = rank["address"]
            env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(rank["side_channel_port"])
        return {**said, "--enable-prompt-tokens-details": "true"}, env
    said.update({"--enable-metrics": "true", "--enable-cache-report": "true"})
    if role == "prefill":
        said["--disaggregation-bootstrap-port"] = str(rank["bootstrap_port"])
    return said, {**env, "SGLANG_HOST_IP": rank["address"]}


@pytest.mark.parametrize(("name", "worker", "number"), RANKS)
def test_a_server_says_what_the_old_command_meant_and_nothing_else(name: str, worker: str, number: int) -> None:
    case, plan = BY_NAME[name], rendered(name)
    rank = rank_of(plan, worker, number)
    said, env, gpus = meant(case.commands[worker, number])
    more_flags, more_env = _ours(case, rank, worker.split("-")[0])
    if "--disaggregation-bootstrap-port" in said:
        assert said["--disaggregation-bootstrap-port"] == more_flags["--disaggregation-bootstrap-port"]
    assert read(rank["argv"]) == {**said, **more_flags, **case.extra_flags}
    assert rank["env"] == {**env, **more_env, **case.extra_env.get(worker, {})}
    assert rank["gpus"] == gpus
    assert rank["host"] == case.hosts[worker, number]
    engine = ["sglang.launch_server"] if case.engine == "sglang" else ["vllm.entrypoints.cli.main", "serve", plan["model"]]
    assert rank["argv"][1 : 2 + len(engine)] == ["-m", *engine]
    if case.engine == "vllm":
        assert f"vllm serve {plan['model']} " in case.commands[worker, number]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_case_has_the_workers_and_the_kv_path_of_its_script(name: str) -> None:
    case, plan = BY_NAME[name], rendered(name)
    assert {(w["name"], rank["node_rank"]) for w in plan["workers"] for rank in w["ranks"]} == set(case.commands)
    assert plan["transfer_backend"] == case.backend
    seen = {pair["expected_transport"] for pair in plan["pairs"]}
    assert seen == ({case.transport} if case.transport else set())
    assert (plan["engine"], plan["engine_version"]) == (case.engine, TABLES[case.engine].version)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_router_has_the_old_ones_workers_port_and_policy(name: str) -> None:
    case, router = BY_NAME[name], rendered(name)["router"]
    old, new = shlex.split(case.router), router["argv"]
    firsts = {worker["url"]: worker["ranks"][0] for worker in rendered(name)["workers"]}
    wanted = []
    # A prefill worker without its bootstrap port works with 8998 everywhere only; the plan always says it.
    for member in members(old):
        if member[0] == "--prefill" and len(member) == 2 and case.engine == "sglang":
            member.append(str(firsts[member[1]]["bootstrap_port"]))
        wanted.append(member)
    assert members(new) == wanted
    single = {item for item in old if item.startswith("--")} - {"--prefill", "--decode", "--worker-urls", "--host"}
    values = read(new[: new.index(wanted[0][0])])
    assert values["--host"] == router["listen"]
    for flag in single:
        assert values[flag] == (old[old.index(flag) + 1] if flag != "--pd-disaggregation" else "true")
    assert values["--port"] == (old[old.index("--port") + 1] if "--port" in old else "8000")
    disaggregated = {"sglang": "--pd-disaggregation", "vllm": "--vllm-pd-disaggregation"}[case.engine]
    assert (disaggregated in values) is bool(case.transport)
    assert router["host"] == case.router_host


@pytest.mark.parametrize("name", BY_NAME)
def test_the_recorded_parser_takes_every_flag_and_none_is_dead_or_dying(name: str) -> None:
    table = TABLES[BY_NAME[name].engine]
    for worker in rendered(name)["workers"]:
        for rank in worker["ranks"]:
            given = {flag.lstrip("-"): value for flag, value in read(rank["argv"]).items()}
            values: Json = {flag: True if table.flags[flag]["type"] == "bool" else value for flag, value in given.items()}
            assert flags.canonical(table, values, rank["unit"], {}) == values, "the long spelling is used"
            assert not [flag for flag in values if table.flags[flag]["deprecated"]]
            assert not DEAD & {*rank["argv"], *rank["env"]}
            assert "P2pNccl" not in json.dumps(rank)
    assert not DEAD & set(rendered(name)["router"]["argv"])


def test_every_dead_word_stood_in_an_old_command() -> None:
    old = {word.split("=")[0] for case in CASES for text in (*case.commands.values(), case.router) for word in shlex.split(text)}
    assert old >= DEAD
    assert old >= {*RENAMED, *SILENT, *ONE_NODE, *ENV_TO_FLAG}


@pytest.mark.parametrize("name", BY_NAME)
def test_prefill_and_decode_agree_where_a_transfer_fails_otherwise(name: str) -> None:
    for flag in ("--page-size", "--kv-cache-dtype", "--json-model-override-args"):
        values = {read(rank["argv"]).get(flag) for worker in rendered(name)["workers"] for rank in worker["ranks"]}
        assert len(values) == 1, flag


def test_a_worker_over_several_hosts_meets_at_its_first_and_only_that_one_is_asked_for_health() -> None:
    for name in ("deepseek-r1", "deepseek-r1-reverse", "deepseek-v3-mooncake"):
        for worker in rendered(name)["workers"]:
            first = worker["ranks"][0]
            assert worker["url"] == f"http://{first['address']}:{first['port']}"
            assert [("health_url" in rank) for rank in worker["ranks"]] == [True] + [False] * (len(worker["ranks"]) - 1)


def test_the_masked_card_is_nowhere_and_the_mask_is_one() -> None:
    for name in ("deepseek-r1", "deepseek-r1-reverse"):
        text = json.dumps(rendered(name))
        assert "mlx5_2" not in text
        for worker in rendered(name)["workers"]:
            for rank in worker["ranks"]:
                mask = read(rank["argv"])["--disaggregation-ib-device"]
                assert mask == ",".join(rank["rdma_devices"])
                assert rank["env"]["NVSHMEM_HCA_LIST"] == mask
                assert rank["env"].get("NCCL_IB_HCA", "").replace(":1", "") == (f"={mask}" if len(rank["gpus"]) > 1 else "")


def test_the_cache_of_compiled_kernels_has_its_new_name() -> None:
    _, plan = typed("deepseek-r1", "-e", "cache_dir=/ssd/jit")
    for worker in plan["workers"]:
        for rank in worker["ranks"]:
            assert rank["env"]["SGLANG_DG_CACHE_DIR"].startswith("/ssd/jit/")
            assert not [name for name in rank["env"] if name.startswith("SGL_")]


def test_the_debugging_balancer_is_still_to_be_had() -> None:
    _, plan = typed("gh200", "-e", "router=mini-lb", "-e", "router_policy=random")
    assert plan["router"]["argv"][1:3] == ["-m", "sglang_router.launch_router"]
    assert {"--mini-lb", "--pd-disaggregation"} <= set(plan["router"]["argv"])
    assert members(plan["router"]["argv"]) == [
        ["--prefill", "http://192.0.2.79:30000", "8998"],
        ["--decode", "http://192.0.2.79:30001"],
    ]


def test_the_least_load_is_asked_of_a_router_that_can_see_it() -> None:
    _, plan = typed("h200x8", "-e", "router=smg", "-e", "router_decode_policy=least_load")
    values = read(plan["router"]["argv"][: -len(plan["router"]["members"])])
    assert (values["--policy"], values["--decode-policy"]) == ("round_robin", "least_load")
    refused, _ = typed("h200x8", "-e", "router_policy=power_of_two")
    assert refused.returncode != 0
    assert "/get_load" in refused.stdout + refused.stderr
    assert "router=smg" in refused.stdout + refused.stderr


def images(folder: Path, hosts: list[str]) -> list[str]:
    """A second inventory that pins an image for each host, of its own architecture; what to type for it."""
    file = folder / "images.yml"
    pinned = {host: {"engine_image": f"lmsysorg/sglang:v0.5.23@sha256:{number:064x}"} for number, host in enumerate(hosts)}
    file.write_text(yaml.safe_dump({"all": {"hosts": pinned}}))
    return ["-i", str(file), "-e", "runtime=docker"]


@pytest.mark.parametrize(
    ("name", "hosts"),
    [
        ("gh200-intra-node", ["gh200"]),
        ("gh200-pair", ["gh200a", "gh200b"]),
        ("gh200-a100-inter-node", ["gh200", "a100"]),
        ("h200x8-3p1d", ["h200"]),
    ],
)
def test_in_containers_as_in_the_scripts_only_the_command_differs(tmp_path: Path, name: str, hosts: list[str]) -> None:
    """`docker run --gpus all --shm-size 32g --network=host --ipc=host IMAGE`, the image pinned for each architecture."""
    done, plan = typed(BY_NAME[name].inventory, *BY_NAME[name].typed, *images(tmp_path, hosts))
    assert done.returncode == 0, done.stdout + done.stderr
    for worker in plan["workers"]:
        for rank in worker["ranks"]:
            outside, client = rank_of(rendered(name), worker["name"], rank["node_rank"]), rank["container"]["argv"]
            image = f"lmsysorg/sglang:v0.5.23@sha256:{hosts.index(rank['host']):064x}"
            assert rank["container"]["image"] == image
            assert [client[client.index("--entrypoint") + 1], *client[client.index(image) + 1 :]] == rank["argv"]
            assert rank["argv"] == ["python3", *outside["argv"][1:]]
            lent = ",".join(map(str, plan["hosts"][rank["host"]]["gpus"]))
            for flag, value in {"--gpus": f'"device={lent}"', "--network": "host", "--ipc": "host"}.items():
                assert client.count(flag) == 1
                assert client[client.index(flag) + 1] == value
            # Beside --ipc=host docker takes no notice of it: /dev/shm is the host's.
            assert "--shm-size" not in client
            assert plan["hosts"][rank["host"]]["installs"] == outside_installs(name, rank["host"])
    assert {rank["host"] for worker in plan["workers"] for rank in worker["ranks"]} == set(hosts)


def outside_installs(name: str, host: str) -> list[Json]:
    """A host's virtualenvs in the plan of a case, but for the engine's: in a container that is the image."""
    rows: list[Json] = rendered(name)["hosts"][host]["installs"]
    assert [row for row in rows if row["name"] == "sglang-0.5.23"]
    return [row for row in rows if row["name"] != "sglang-0.5.23"]


def test_shared_memory_of_a_size_is_there_for_who_shares_none_with_others(tmp_path: Path) -> None:
    own = [*images(tmp_path, ["h200"]), "-e", "engine_shm_size=32g"]
    done, plan = typed("h200x8", "-e", "ratio=4agg", *own)
    assert done.returncode == 0, done.stdout + done.stderr
    for worker in plan["workers"]:
        client = worker["ranks"][0]["container"]["argv"]
        assert client[client.index("--shm-size") + 1] == "32g"
        assert "--ipc" not in client
    refused, _ = typed("h200x8", "-e", "ratio=3p1d", *own)
    assert refused.returncode != 0
    assert "engine_shm_size=32g takes containers out of the host's IPC namespace" in " ".join(refused.stdout.split())


@pytest.mark.parametrize(
    ("inventory", "image", "said"),
    [
        ("gh200", "", "runtime is docker, so engine_image must name the engine's image, such as lmsysorg/sglang:v0.5.23@sha256:"),
        ("gh200-a100", "lmsysorg/sglang:v0.5.23", "imagetools inspect lmsysorg/sglang:v0.5.23` shows it"),
        ("h200x8", "lmsysorg/sglang:latest", "the tag latest moves"),
    ],
)
def test_a_container_without_a_pinned_image_is_refused_with_a_way_to_find_the_digest(
    inventory: str, image: str, said: str
) -> None:
    refused, _ = typed(inventory, "-e", "runtime=docker", "-e", f"engine_image={image}")
    assert refused.returncode != 0
    assert said in " ".join((refused.stdout + refused.stderr).split())


def test_an_older_version_refuses_a_newer_flag_with_what_it_is_called_there() -> None:
    refused, _ = typed("deepseek-r1", "-e", "engine_version=0.5.17")
    text = " ".join((refused.stdout + refused.stderr).split())
    assert refused.returncode != 0
    assert "sglang 0.5.17 has no flag attn-dp-size; 0.5.23 has it, in place of enable-dp-attention (use --attn-dp-size" in text
    # what the page says to write instead
    old = {"prefill_engine_args": {"enable-dp-attention": True, "dp-size": 24, "init-expert-location": "/e.json"}}
    old["decode_engine_args"] = {"enable-dp-attention": True, "dp-size": 8, "cuda-graph-bs": [256]}
    done, plan = typed("deepseek-r1", "-e", "engine_version=0.5.17", "-e", json.dumps(old))
    assert done.returncode == 0, done.stdout + done.stderr
    assert read(rank_of(plan, "prefill-0", 0)["argv"])["--dp-size"] == "24"


def test_a_shipped_file_has_its_path_on_every_prefill_host() -> None:
    file = "tests/data/README.md"
    given = {"engine_files": [file], "prefill_engine_args": {"attn-dp-size": 24, "init-expert-location": "README.md"}}
    done, plan = typed("deepseek-r1", "-e", json.dumps(given))
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(3):
        argv = rank_of(plan, "prefill-0", rank)["argv"]
        assert read(argv)["--init-expert-location"] == "/var/lib/pd/files/README.md"
    assert {name: host["files"] for name, host in plan["hosts"].items()} == {f"n{n}": [file] for n in (1, 2, 3, 4)}


def test_the_cut_model_is_marked_in_the_plan_and_the_table() -> None:
    cut = {name: plan["truncated"] for name in BY_NAME for plan in [rendered(name)] if plan["truncated"]}
    assert cut == dict.fromkeys(
        ("deepseek-r1", "deepseek-r1-reverse"), "json-model-override-args cuts the model down to 20 layers"
    )
    assert f"The model is not whole: {cut['deepseek-r1']}; results are marked so." in tables.workers(rendered("deepseek-r1"))


def test_aggregated_servers_have_no_transfer_backend_whatever_the_inventory_says() -> None:
    _, npu = typed("ascend-single-node", "-e", "ratio=agg")
    for plan, visible in ((rendered("gh200-aggregated"), "CUDA_VISIBLE_DEVICES"), (npu, "ASCEND_RT_VISIBLE_DEVICES")):
        assert (plan["transfer_backend"], plan["transfer_backend_reason"]) == ("none", "aggregated workers move no KV cache")
        assert rank_of(plan, "aggregated-0", 0)["env"][visible] == "0"


#: inventory -> the load of its scripts
LOADS: dict[str, Json] = {
    **{
        name: {"bench_num_requests": 200, "bench_input_len": "512", "bench_output_len": "128", "bench_concurrency": [200]}
        for name in ("gh200", "gh200-pair", "gh200-a100")
    },
    "h200x8": {"bench_concurrency": [32, 64, 128]},
    "vllm-xpyd": {
        "bench_concurrency": [1, 2, 4, 8], "bench_num_requests": 100, "bench_input_len": "256", "bench_output_len": "512",
    },
    "deepseek-r1": {
        "bench_concurrency": [8192], "bench_num_requests": 8192, "bench_input_len": "4096", "bench_output_len": "128",
        "bench_warmup": 0,
    },
    "deepseek-r1-reverse": {
        "bench_concurrency": [9000], "bench_num_requests": 9000, "bench_input_len": "4000", "bench_output_len": "100",
        "bench_warmup": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("inventory", LOADS)
def test_the_load_is_that_of_the_scripts(inventory: str) -> None:
    given = yaml.safe_load((REPO / "inventory" / inventory / "hosts.yml").read_text())["all"]["vars"]
    typed = {name: settings.convert(VARIABLES[name], given.get(name), inventory) for name in LOADS[inventory]}
    assert typed == LOADS[inventory]


def test_every_scenario_inventory_has_a_case_and_a_page() -> None:
    folders = {path.parent.name for path in (REPO / "inventory").glob("*/hosts.yml")}
    # slurm is a way to have hosts, and no setup
    assert {case.inventory for case in CASES} == {name for name in folders - {"slurm"} if "local" not in name.split("-")}
    page = (REPO / "docs" / "scenarios.md").read_text()
    assert {case.inventory for case in CASES} <= set(re.findall(r"-i inventory/([\w-]+)", page))


def test_every_command_of_the_page_is_one_that_exists() -> None:
    commands = re.findall(r"^    (ansible-playbook .*?)(?: +#.*)?$", (REPO / "docs" / "scenarios.md").read_text(), re.M)
    assert len(commands) > 10
    for command in commands:
        words = shlex.split(command.replace("<setup>", "local"))
        assert (REPO / words[1]).is_file(), command
        assert words[2] == "-i", command
        assert (REPO / words[3] / "hosts.yml").is_file(), command
        given = {words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "-e"}
        assert given <= VARIABLES.keys(), command
