"""What a user gets wrong is refused before a host is touched: one clear message, no traceback, non-zero exit."""

from __future__ import annotations

from pathlib import Path

import pytest
from local.conftest import Checkout

CASES = {
    "ratio word": (["-e", "ratio=3x1d"], "ratio='3x1d' is not a ratio", "NpMd"),
    "no prefill": (["-e", "ratio=0p4d"], "ratio='0p4d' is not a ratio", "NpMd"),
    "half a ratio": (["-e", "ratio=3p"], "ratio='3p' is not a ratio", "NpMd"),
    "too few GPUs": (["-e", "ratio=7p2d"], "needs 7 x 1 GPU(s); GPUs by host: gh200 4 and a100 4", "ratios that fit"),
    "unknown host": (["-l", "gh20"], "gh20", "Could not match"),
    "router left out": (["-l", "gh200"], "--limit leaves out a100, the router", "type -l gh200,a100"),
    "worker left out": (["-l", "a100", "-e", "ratio=4p4d"], "it needs gh200, too", "type -l a100,gh200"),
    "unknown variable": (["-e", "ratoi=3p1d"], "there is no variable ratoi", "did you mean ratio?"),
    "unknown engine": (["-e", "engine=sglan"], "engine='sglan'", "did you mean sglang?"),
    "unknown backend": (["-e", "transfer_backend=nixel"], "transfer_backend='nixel'", "did you mean nixl?"),
    "no tensor parallelism": (["-e", "tensor_parallel_size=0"], "tensor_parallel_size='0' (-e)", "at least 1"),
    "not a number": (["-e", "tensor_parallel_size=two"], "tensor_parallel_size='two' (-e)", "a whole number"),
    "unknown flag": (
        ["-e", "engine=sglang", "-e", "model=m", "-e", '{"engine_args": {"page-sise": 16}}'],
        "has no flag page-sise",
        "did you mean page-size?",
    ),
    "removed flag": (
        ["-e", "engine=sglang", "-e", "model=m", "-e", '{"engine_args": {"enable-deepep-moe": true}}'],
        "enable-deepep-moe",
        "moe-a2a-backend",
    ),
    "owned flag": (
        ["-e", "engine=sglang", "-e", "model=m", "-e", '{"engine_args": {"port": 1}}'],
        "port is set by the plan",
        "worker_port_base",
    ),
    "unknown flag of the router": (
        ["-e", '{"router_args": {"request-timeout-sec": 5}}'],
        "router_args: sglang-router 0.3.2 has no flag request-timeout-sec",
        "did you mean request-timeout-secs?",
    ),
    "no such engine file": (
        ["-e", '{"engine_files": ["no/experts.json"]}'],
        "engine_files has no/experts.json: No such file",
        "checkout",
    ),
    "router without the engine": (
        ["-e", "engine=vllm", "-e", "model=m"],
        "router=sglang-router cannot route for engine vllm",
        "smg or vllm-router",
    ),
    "policy whose endpoint is gone": (
        ["-e", "engine=sglang", "-e", "model=m", "-e", "router_policy=power_of_two"],
        "/get_load, which sglang 0.5.23 does not have",
        "router=smg",
    ),
    "no model": (["-e", "engine=sglang", "-e", "model="], "model is not set", "-e model="),
    "unknown choice": (["-e", "router_policy=rond_robin"], "router_policy='rond_robin'", "round_robin"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_before_any_host_is_touched(checkout: Checkout, name: str) -> None:
    arguments, what, right = CASES[name]
    for verb in ("deploy_pd.yml", "plan.yml") if name == "unknown variable" else ("deploy_pd.yml",):
        failed = checkout.play(verb, *arguments)
        text = " ".join(failed.text.split())
        assert failed.code != 0, failed.text
        assert what in text, failed.text
        assert right in text, failed.text
        assert "Traceback" not in failed.text
        assert "preflight" not in failed.text
    assert checkout.processes() == []


def test_an_inventory_that_cannot_be_read_is_no_empty_success(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    (checkout.folder / "broken.yml").write_text("all:\n  hosts: [\n")
    for path, what in (("inventory/nowhere", "inventory/nowhere"), ("broken.yml", "broken.yml"), ("inventory/slurm", "salloc")):
        failed = checkout.play("plan.yml", "-i", path)
        assert failed.code != 0, failed.text
        assert what in failed.text
        assert "Traceback" not in failed.text


def test_a_slurm_allocation_is_an_inventory(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NODELIST": "127.0.0.[2-3]", "ID": "77"}.items():
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    planned = checkout.play("plan.yml", "-i", "inventory/slurm", "-e", "ratio=2p1d").good()
    for row in ("prefill-0  127.0.0.2", "prefill-1  127.0.0.2", "decode-0   127.0.0.3"):
        assert row in planned.text, planned.text


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["-e", "bench_concurrency=0"], "at least 1"),
        (["-e", "bench_input_len=long"], "a length such as 512"),
        (["-e", "bench_request_rate=fast"], "expected numbers above 0"),
        (["-e", "bench_trace=nowhere.jsonl"], "there is no such file"),
        (["-e", "bench_api=complete"], "did you mean completions?"),
    ],
)
def test_bench_refuses_a_bad_load_before_it_deploys(checkout: Checkout, arguments: list[str], what: str) -> None:
    failed = checkout.play("bench.yml", *arguments)
    assert failed.code != 0
    assert what in " ".join(failed.text.split())
    assert "preflight" not in failed.text
    assert checkout.processes() == []


def test_a_misspelt_inventory_variable_is_refused(checkout: Checkout) -> None:
    path = checkout.folder / "inventory" / "local" / "host_vars" / "gh200.yml"
    before = path.read_text()
    path.write_text(before + "rdma_device: [mlx5_0]\n")
    try:
        failed = checkout.play("plan.yml")
        assert failed.code != 0
        assert "host gh200 sets rdma_device" in failed.text
        assert "did you mean rdma_devices?" in failed.text
    finally:
        path.write_text(before)


#: `address` by way of which inventory_hostname comes in, or a name of each host's own
REACHED = """
all:
  vars:
    domain: x.invalid
    address: "{{ inventory_hostname }}.{{ domain }}"
    ansible_host: "{{ WAY }}"
    ansible_become_password: "{{ lookup('ansible.builtin.password', folder ~ '/' ~ inventory_hostname) }}"
    gpus: 2
    rdma_fabric: none
    engine: emulated
    model: emulated/qwen2.5-3b
  children:
    prefill_nodes: {hosts: {n1: {node: n1}}}
    decode_nodes: {hosts: {n2: {node: n2}}}
    router: {hosts: {n1: }}
    bench_clients: {hosts: {n1: }}
"""


def test_hosts_that_are_reached_by_another_one_s_name_are_refused(checkout: Checkout, tmp_path: Path) -> None:
    """Ansible delegates with the name of the host that delegates: the lock would be taken on another host than the router's."""
    file, words = tmp_path / "hosts.yml", ("-e", f"plan_dir={tmp_path / 'plan'}")
    for way, wrong in (("address", True), ("inventory_hostname", True), ("node ~ '.' ~ domain", False)):
        file.write_text(REACHED.replace("WAY", way).replace("folder ~", f"'{tmp_path}/made' ~"))
        done = checkout.play("plan.yml", "-i", str(file), *words)
        # Ansible renders that of the task's own host; we neither ask for another one's nor show any.
        made = {path.name: path.read_text().strip() for path in (tmp_path / "made").glob("*")}
        assert made.keys() <= {"n1"}
        assert not [secret for secret in made.values() if secret in done.text]
        assert (done.code != 0) == wrong, done.text
        assert ("ansible_host of n1 depends on inventory_hostname" in " ".join(done.text.split())) == wrong


def test_plan_writes_and_removes_only_its_own_files(checkout: Checkout) -> None:
    folder = checkout.folder / "plans"
    (folder / "docs").mkdir(parents=True)
    (folder / "docs" / "pd-thesis.txt").write_text("mine")
    checkout.play("plan.yml", "-e", f"plan_dir={folder}").good()
    assert (folder / "gh200" / "pd-prefill-2.service").exists()
    assert checkout.play("plan.yml", "-e", f"plan_dir={folder}").good().changed == {"gh200": 0}
    checkout.play("plan.yml", "-e", f"plan_dir={folder}", "-e", "ratio=2p2d").good()
    assert not (folder / "gh200" / "pd-prefill-2.service").exists()
    assert (folder / "docs" / "pd-thesis.txt").read_text() == "mine"
