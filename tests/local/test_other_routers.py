"""The other routers for real, started as the plan starts them and led by the code that leads them on hosts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from emulated_workers import Service, free_port, profile_file, service, wait_for, worker
from toolbox import router_python, venv_python
from vllm_like import VllmLike, workers

from pdlib import flags, routers
from pdlib.gateway import Gateway, Member

Workers = Sequence[tuple[str, str, int | None]]
BODY = {"model": "m", "prompt": "the quick brown fox jumps", "max_tokens": 6, "ignore_eos": True}


@contextlib.contextmanager
def front(
    name: str, engine: str, members: Workers, *, by_command_line: bool = True, key: str = "", **changes: Any
) -> Iterator[Service]:
    """The router as the plan renders it."""
    facts, port = routers.router(name), free_port()
    python = router_python() if name == "mini-lb" else venv_python(name, facts.requirements[0])
    context = routers.RouterContext(
        python=python, state_dir="", listen="127.0.0.1", port=port, prometheus_port=free_port(), policy="round_robin",
        prefill_policy=None, decode_policy=None, check_interval=1, ready_timeout=60, disaggregated=True, workers=members,
        api_key=False, tls=False, engine=engine,
    )  # fmt: skip
    context = dataclasses.replace(context, **changes)
    argv = [*facts.command(context), *flags.argv(facts.flags(context)), *(facts.members(context) if by_command_line else [])]
    argv += ["--api-key", key] if key else []
    with service(argv, f"http://127.0.0.1:{port}", "/health") as made:
        yield made


def until_done(step: Any, limit: int = 10) -> list[str]:
    """Take steps as pd_poll does; return what changed."""
    changed: list[str] = []
    for number in range(limit):
        outcome = step(number > 0)
        changed += outcome.changed
        if outcome.done:
            return changed
    raise AssertionError(outcome.message)


def prefill_of(made: Service) -> Member:
    return Member(made.url, "prefill", made.bootstrap_port)


def test_smg_takes_and_leaves_emulated_workers_while_it_runs(tmp_path: Path) -> None:
    quick = profile_file(tmp_path)
    with (
        worker("prefill", quick, "--model-path", "m") as prefill,
        worker("decode", quick, "--model-path", "m") as first,
        worker("decode", quick, "--model-path", "m") as second,
        front("smg", "emulated", [("prefill", prefill.url, prefill.bootstrap_port), ("decode", first.url, None)]) as smg,
    ):
        door = Gateway(smg.url, None, {"membership": "workers"})
        one = [prefill_of(prefill), Member(first.url, "decode")]
        both, other = [*one, Member(second.url, "decode")], [one[0], Member(second.url, "decode")]
        wait_for(lambda: smg.get("/readiness")[0] == 200, "ready")
        assert until_done(lambda resumed: door.converge(one, False, resumed)) == []
        assert len(smg.json("/v1/completions", BODY)["choices"][0]["text"].split()) == 6
        assert until_done(lambda resumed: door.converge(both, False, resumed)) == [f"added decode {second.url} to the router"]
        for _ in range(4):
            assert smg.post("/v1/completions", BODY)[0] == 200
        for made in (first, second):
            made.wait_until_idle()
            assert made.metrics()["num_requests_total"] >= 2
        assert until_done(lambda _: door.remove_surplus(other, False)) == [f"removed decode {first.url} from the router"]
        served = first.metrics()["num_requests_total"]
        for _ in range(2):
            assert smg.post("/v1/completions", BODY)[0] == 200
        assert first.metrics()["num_requests_total"] == served
        # the same URL again, at once: refused with 409 until the old one has drained
        assert until_done(lambda resumed: door.converge(both, False, resumed)) == [f"added decode {first.url} to the router"]
        assert smg.process.poll() is None


def kv_sources(members: Sequence[VllmLike]) -> list[dict[str, int]]:
    return [dict(member.sources) for member in members]


def test_smg_moves_kv_between_vllm_workers_that_were_registered_with_their_connector() -> None:
    extra = routers.router("smg").registers("vllm", True)
    with workers("p", "d") as (prefill, decode), front("smg", "vllm", [], by_command_line=False) as smg:
        door = Gateway(smg.url, None, {"membership": "workers", "registration": extra})
        wanted = [Member(prefill.url, "prefill"), Member(decode.url, "decode")]
        changed = until_done(lambda resumed: door.converge(wanted, False, resumed))
        assert changed == [f"added {m.role} {m.url} to the router" for m in wanted]
        assert smg.post("/v1/completions", BODY)[0] == 200
        assert kv_sources([prefill, decode]) == [{"local_compute": 1}, {"external_kv_transfer": 1}]
        assert decode.bodies[0]["kv_transfer_params"]["remote_engine_id"] == "p"


def test_what_smg_would_do_with_vllm_workers_of_its_command_line() -> None:
    """Why they are registered instead: decode computes the prompt again, and nobody is told."""
    with workers("p", "d") as (prefill, decode):
        members: Workers = [("prefill", prefill.url, None), ("decode", decode.url, None)]
        with front("smg", "vllm", members) as smg:
            wait_for(lambda: smg.get("/readiness")[0] == 200, "ready")
            assert smg.post("/v1/completions", BODY)[0] == 200
            assert decode.sources == {"local_compute": 1}


def test_vllm_router_takes_both_steps_and_its_members_only_at_its_start() -> None:
    with workers("p0", "p1", "d") as (first, second, decode):
        members: Workers = [("prefill", first.url, None), ("prefill", second.url, None), ("decode", decode.url, None)]
        with front("vllm-router", "vllm", members) as made:
            door = Gateway(made.url, None, {"membership": "restart"})
            wanted = [Member(url, role) for role, url, _ in members]
            assert until_done(lambda resumed: door.converge(wanted, False, resumed)) == []
            for _ in range(4):
                assert made.post("/v1/completions", BODY)[0] == 200
            assert kv_sources([first, second, decode]) == [
                {"local_compute": 2},
                {"local_compute": 2},
                {"external_kv_transfer": 4},
            ]
            assert {body["max_tokens"] for body in first.bodies} == {1}
            assert not door.converge(wanted[:2], True, False).changed
            outcome = door.converge(wanted[:2], False, False)
            assert not outcome.done
            assert f"{decode.url} to go" in outcome.message
            status, text = made.post("/workers", {"url": decode.url, "worker_type": "decode"})
            assert status == 400, "as long as this is so, membership is restart"
            assert b"add_decode_server" in text


@pytest.mark.parametrize(("policy", "asked"), [("power_of_two", {"/get_load"}), ("sticky_least_loaded", set())])
def test_what_policies_of_vllm_router_ask_workers_for(policy: str, asked: set[str]) -> None:
    """vLLM has no /get_load: hence routers.py refuses the policy that needs it."""
    common = {"/health", "/metrics", "/v1/models", "/v1/completions"}
    with workers("p", "d") as made:
        members: Workers = [("prefill", made[0].url, None), ("decode", made[1].url, None)]
        with front("vllm-router", "vllm", members, policy=policy) as router:
            wait_for(lambda: router.get("/readiness")[0] == 200, "ready")
            for _ in range(3):
                assert router.post("/v1/completions", BODY)[0] == 200
        assert {call.split()[1] for worker in made for call in worker.calls} - common == asked


@pytest.mark.parametrize(("name", "sent", "unasked"), [("smg", "Bearer k3y", 401), ("vllm-router", "Bearer ", 200)])
def test_the_key_passes_from_router_to_workers_or_the_plan_refuses_it(name: str, sent: str, unasked: int) -> None:
    with workers("p", "d") as made:
        members: Workers = [("prefill", made[0].url, None), ("decode", made[1].url, None)]
        with front(name, "vllm", members, key="k3y") as router:
            wait_for(lambda: router.get("/readiness", "k3y")[0] == 200, "ready")
            assert router.post("/v1/completions", BODY)[0] == unasked
            assert router.post("/v1/completions", BODY, "k3y")[0] == 200
        assert [worker.keys for worker in made] == [{sent}] * 2
    assert routers.router(name).takes_key == (sent == "Bearer k3y")


def test_vllm_workers_alone_behind_either_router() -> None:
    for name in ("smg", "vllm-router"):
        with workers("a", "b") as made:
            members: Workers = [("aggregated", each.url, None) for each in made]
            with front(name, "vllm", members, disaggregated=False) as router:
                door = Gateway(router.url, None, {"membership": routers.router(name).membership})
                until_done(
                    lambda resumed, door=door, made=made: door.converge([Member(w.url, "regular") for w in made], False, resumed)
                )
                for _ in range(4):
                    assert router.post("/v1/completions", BODY)[0] == 200
            assert kv_sources(made) == [{"local_compute": 2}] * 2, name


def test_the_debugging_balancer(tmp_path: Path) -> None:
    quick = profile_file(tmp_path)
    with (
        worker("prefill", quick, "--model-path", "m") as prefill,
        worker("decode", quick, "--model-path", "m") as decode,
        front(
            "mini-lb",
            "emulated",
            [("prefill", prefill.url, prefill.bootstrap_port), ("decode", decode.url, None)],
            policy="random",
        ) as made,
    ):
        door = Gateway(made.url, None, {"membership": "restart"})
        assert (
            until_done(lambda resumed: door.converge([prefill_of(prefill), Member(decode.url, "decode")], False, resumed)) == []
        )
        status, data = made.post("/generate", {"text": "a b", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}})
        assert status == 200
        assert len(json.loads(data)["text"].split()) == 4


#: s of a prefill step
STEP_S = 1.5
ASKED: dict[str, dict[str, Any]] = {
    "/generate": {"text": "a b", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}, "stream": True},
    "/v1/completions": {**BODY, "stream": True},
}
LATE = {"/v1/completions"}


def first_byte_s(made: Service, path: str) -> float:
    """Return when an answer begins whose successor is in prefill's next step, in s."""

    def ask() -> float:
        headers = {"Content-Type": "application/json"}
        call = urllib.request.Request(made.url + path, json.dumps(ASKED[path]).encode(), headers)
        with urllib.request.urlopen(call, timeout=30) as answer:
            while not answer.read1().strip():
                pass
            return time.monotonic() - began

    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask)
        time.sleep(STEP_S / 3)
        pool.submit(ask)
        return first.result()


@pytest.mark.parametrize(("name", "waits"), [("sglang-router", set(ASKED)), ("smg", LATE), ("mini-lb", LATE)])
def test_who_keeps_the_first_token_back_until_prefill_has_answered(tmp_path: Path, name: str, waits: set[str]) -> None:
    """Decode has it after one step of prefill, which answers after two: `Simulation` and stage `prefill_answer` rest on it."""
    slow = profile_file(tmp_path, prefill_overhead_ms=1000 * STEP_S)
    with worker("prefill", slow, "--model-path", "m") as prefill, worker("decode", slow, "--model-path", "m") as decode:
        members: Workers = [("prefill", prefill.url, prefill.bootstrap_port), ("decode", decode.url, None)]
        with front(name, "emulated", members, policy="random" if name == "mini-lb" else "round_robin") as made:
            if routers.router(name).membership == "workers":
                door = Gateway(made.url, None, {"membership": "workers"})
                until_done(lambda resumed: door.converge([prefill_of(prefill), Member(decode.url, "decode")], False, resumed))
            for path in ASKED:
                steps = first_byte_s(made, path) / STEP_S
                assert (steps > 1.9) == (path in waits), (path, steps)
                assert 0.9 < steps < 2.6, (path, steps)
                time.sleep(2 * STEP_S)
