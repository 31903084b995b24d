"""The KV cache that real SGLang moves is the right one, and a wrong one is found: `make test-kv`.

Three servers a transfer engine: a prefill worker, one that sends wrong pages on purpose (corrupt/), and a decode worker for
both; beside them one aggregated server. Answers over the pairs are held against those of the aggregated server token by
token, and against what the prefill worker says of them (pdbench.run.verify), which is what `bench_verify_outputs` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from local.conftest import free_base
from real import helpers

from pdbench.engines import engine
from pdbench.evidence import Deployment, Evidence, Pair
from pdbench.load.prompts import Prompts
from pdbench.run.verify import LIMIT_NATS, OUTPUT_TOKENS, Asked, Verifier

pytestmark = pytest.mark.skipif(not os.environ.get("PD_TEST_KV"), reason="some minutes of real SGLang: make test-kv")

MODEL = Path(__file__).resolve().parents[2] / ".pd" / "tiny-model"
PROMPTS, CONTROLS = 100, 20
PAGE = 16
#: Tokens whose log-probabilities differ by less than this, in nats, are a tie: two steps of the engine's bfloat16 logits.
TIE_NATS = 0.06
FLAGS = {
    **{"device": "cpu", "attention-backend": "torch_native", "sampling-backend": "pytorch", "host": "127.0.0.1"},
    **{"served-model-name": "tiny", "max-total-tokens": 8192, "max-running-requests": 8, "context-length": 2048},
    **{"page-size": PAGE, "disable-overlap-schedule": "", "sleep-on-idle": ""},
}
ENV = {
    "OMP_NUM_THREADS": "1",
    "MC_FORCE_TCP": "1",
    "UCX_TLS": "tcp,self",
    "UCX_NET_DEVICES": "lo",
    "SGLANG_HOST_IP": "127.0.0.1",
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0",
}
_SERIAL = itertools.count()


@dataclass
class Server:
    """One SGLang server; ``flags`` beside FLAGS, ``corrupt``: how it spoils what it sends (corrupt/), "" for not."""

    flags: dict[str, object]
    corrupt: str = ""

    def __post_init__(self) -> None:
        # not among the ports that the system gives to connections: a server that starts for a minute would lose it
        self.port = free_base(2, 26000 + 2 * next(_SERIAL))
        self.bootstrap_port = self.port + 1
        self.url = f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def run(self, folder: Path) -> Iterator[None]:
        python, env = helpers.engine_python()
        env = {**env, **ENV}
        if self.corrupt:
            env |= {"PYTHONPATH": str(Path(__file__).with_name("corrupt")), "PD_TEST_CORRUPT_KV": self.corrupt}
        flags = {**FLAGS, "model-path": MODEL, "port": self.port, **self.flags}
        if "disaggregation-mode" in flags:
            flags["disaggregation-bootstrap-port"] = self.bootstrap_port
        argv = [item for name, value in flags.items() for item in (f"--{name}", str(value)) if item]
        self.log = folder / f"{self.port}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "-m", "sglang.launch_server", *argv], stdout=log, stderr=log, env=env, cwd=folder, start_new_session=True
            )
            try:
                yield
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(20)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def wait(self, limit_s: float = 400) -> None:
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
            # it answers requests before its warm-up has ended, and /health only after it
            with contextlib.suppress(helpers.ServerError):
                helpers.get(f"{self.url}/health")
                return
            time.sleep(0.5)
        pytest.fail(f"not up after {limit_s} s: {self.log.read_text(errors='replace')[-3000:]}")


@contextlib.contextmanager
def running(*servers: Server) -> Iterator[None]:
    if not (MODEL / "config.json").exists():
        pytest.skip("no model: make tiny-model")
    with tempfile.TemporaryDirectory(prefix="pd-kv-") as folder, contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server.run(Path(folder)))
        for server in servers:
            server.wait()
        yield


@pytest.fixture(scope="module")
def whole() -> Iterator[Server]:
    """The aggregated server."""
    server = Server({})
    with running(server):
        yield server


def verified(prefill: Server, decode: Server, count: int) -> tuple[dict[str, Any], list[Asked]]:
    """What `pdbench run --verify-outputs` finds for a pair, and the prompts and answers behind it."""
    workers = {"prefill-0": prefill.url, "decode-0": decode.url}
    pair = Pair("prefill-0", "decode-0", "127.0.0.1", prefill.bootstrap_port)
    deployment = Deployment("1p1d", engine("sglang"), 0, "", "", workers, (pair,))

    async def verify() -> tuple[dict[str, Any], list[Asked]]:
        with ThreadPoolExecutor(1) as pool:
            evidence, verifier = Evidence(deployment, {}, {}, pool), Verifier(deployment, {}, 120)
            try:
                await verifier.ask(Prompts(seed=11), count)
                emptied: dict[str, Any] = {}
                await evidence.reset(emptied)
                await verifier.compare(emptied)
            finally:
                await verifier.close()
                await evidence.close()
        report: Any = verifier.report(count)["pairs"]
        return report[0], verifier.asked[0]

    found, asked = asyncio.run(verify())
    print(f"{len(asked)} prompts: {found}")
    return found, asked


def unlike(whole: Server, answers: Sequence[Asked]) -> tuple[int, int]:
    """Count the answers that are not the aggregated server's, and those that part from it at a tie only."""

    def parts(answer: Asked) -> str:
        body = {
            "input_ids": answer.prompt,
            "sampling_params": {"max_new_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True},
            "return_logprob": True,
            "top_logprobs_num": 5,
        }
        reply = helpers.ask(f"{whole.url}/generate", body, timeout_s=120)
        for place, (mine, theirs) in enumerate(zip(reply["output_ids"], answer.ids, strict=True)):
            if mine != theirs:
                top = reply["meta_info"]["output_top_logprobs"][place]
                tied = [row[1] for row in top if top[0][0] - row[0] < TIE_NATS]
                return "tie" if theirs in tied else "other"
        return ""

    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(parts, answers))
    print(f"{len(ends)} answers beside an aggregated server's: {ends.count('other')} others, {ends.count('tie')} part at a tie")
    return ends.count("other"), ends.count("tie")


@pytest.mark.parametrize("backend", ["mooncake_tcp", "nixl"])
def test_the_kv_cache_arrives_right_and_a_wrong_one_is_found(backend: str, whole: Server) -> None:
    common = {"disaggregation-transfer-backend": backend}
    right, wrong = (Server({**common, "disaggregation-mode": "prefill"}, how) for how in ("", "page"))
    decode = Server({**common, "disaggregation-mode": "decode", "disaggregation-decode-retraction-backup": "cpu_tensor"})
    with running(right, wrong, decode):
        found, answers = verified(right, decode, PROMPTS)
        assert (found["error"], found["prompts"], found["wrong_prompts"], found["wrong_tokens"]) == ("", PROMPTS, 0, 0)
        assert found["worst_nats"] < LIMIT_NATS / 2
        others, ties = unlike(whole, answers)
        assert others == 0
        assert ties <= PROMPTS // 20

        # One page of each prompt comes from another place: bytes, times and lengths are what they were.
        found, answers = verified(wrong, decode, CONTROLS)
        assert (found["error"], found["prompts"]) == ("", CONTROLS)
        assert found["wrong_prompts"] > CONTROLS // 2
        others, _ = unlike(whole, answers)
        assert others > CONTROLS // 2
