"""The control endpoints, faults and streams of a worker, over HTTP against the application itself."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import json
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer

from pdbench.emulate.config import WorkerConfig
from pdbench.emulate.engine import Engine
from pdbench.emulate.handshake import Timeouts
from pdbench.emulate.job import Job
from pdbench.emulate.server import Server
from pdbench.model import profile

Client = TestClient[Any, Any]
#: A request that is still running when the test is done with it.
LONG = {"text": "a b c", "sampling_params": {"max_new_tokens": 20_000}, "rid": "long"}


def config(step_ms: float = 2, **changes: Any) -> WorkerConfig:
    tiny = profile.load("tiny")
    quick = replace(tiny.engine, prefill_overhead_ms=0.5, decode_overhead_ms=step_ms, decode_us_per_request=0, startup_s=0)
    base = WorkerConfig(
        role="aggregated",
        host="127.0.0.1",
        port=0,
        bootstrap_port=8998,
        profile=replace(tiny, engine=quick, gpu=replace(tiny.gpu, bandwidth_gb_per_s=1e9)),
        model_path="m",
        served_model_name="m",
        tp_size=1,
        max_running_requests=64,
        context_length=32_768,
        max_total_tokens=100_000,
        timeouts=Timeouts(),
    )
    return replace(base, **changes)


@contextlib.asynccontextmanager
async def serving(made: WorkerConfig) -> AsyncIterator[tuple[Server, Client]]:
    server = Server(made)
    server.ready = True
    async with TestClient[Any, Any](TestServer(server.app()), timeout=aiohttp.ClientTimeout(total=60)) as client:
        try:
            yield server, client
        finally:
            for job in server.engine.jobs():
                server.engine.abort(job)
            await server.engine.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def answer(client: Client, path: str, body: object = None, method: str = "POST", key: str = "") -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with client.request(method, path, json=body, headers=headers) as reply:
        text = await reply.text()
    with contextlib.suppress(ValueError):
        return reply.status, json.loads(text)
    return reply.status, text


async def events(reply: aiohttp.ClientResponse) -> list[Any]:
    parts = (await reply.text()).split("\n\n")
    return [json.loads(part.removeprefix("data: ")) for part in parts if part and "[DONE]" not in part]


async def raw(client: Client, *asks: bytes) -> bytes:
    """Send requests on one connection, all at once, and return all that comes until it is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(b"".join(asks))
    data = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return data


def ask(path: str, body: object, version: str = "1.1", close: bool = False) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: x", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, *(["Connection: close"] if close else []), "", ""]).encode() + data


# ---- streams


async def test_a_connection_goes_on_after_a_stream_and_pipelined_answers_keep_their_order() -> None:
    short = {"prompt": "a b c", "max_tokens": 3, "stream": True}
    async with serving(config()) as (server, client):
        data = await raw(
            client,
            ask("/v1/completions", {**short, "stream": False}),
            ask("/v1/completions", short),
            ask("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 2}, "stream": True}),
            ask("/v1/completions", {**short, "max_tokens": 2}, close=True),
        )
        assert server.engine.requests == 0
    whole, first, second, third = data.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert b'"text_completion"' in whole
    assert [part.count(b"data: {") for part in (first, second, third)] == [3, 2, 2]
    for part in (first, second, third):
        head, body = part.split(b"\r\n\r\n", 1)
        assert b"Transfer-Encoding: chunked" in head
        assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert b"Connection: close" not in first
    assert b"Connection: close" in third


async def test_http_1_0_gets_no_chunks_and_an_end_of_file() -> None:
    async with serving(config()) as (_, client):
        data = await raw(client, ask("/v1/completions", {"prompt": "a", "max_tokens": 2, "stream": True}, "1.0"))
    head, body = data.split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"chunked" not in head
    assert body.startswith(b"data: {")
    assert body.endswith(b"}\n\ndata: [DONE]\n\n")


async def test_a_client_that_does_not_read_is_cut_off_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdbench.emulate.stream.UNREAD_LIMIT", 2**18)
    async with serving(config(step_ms=1)) as (server, client):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port, limit=1024)
        writer.write(ask("/generate", {**LONG, "stream": True}))
        await until(lambda: server.engine.requests == 1)
        await until(lambda: server.engine.requests == 0)
        assert server.engine.metrics.slow_clients.values[""] == 1
        assert server.engine.metrics.aborted.values[""] == 1
        data = b""
        with contextlib.suppress(ConnectionError):
            while part := await asyncio.wait_for(reader.read(2**20), 30):
                data += part
        assert not data.endswith(b"0\r\n\r\n")
        writer.close()


async def test_a_client_that_leaves_ends_its_stream() -> None:
    async with serving(config()) as (server, client):
        async with client.post("/v1/completions", json={"prompt": "a", "max_tokens": 20_000, "stream": True}) as reply:
            assert await reply.content.readline()
            reply.close()
        await until(lambda: server.engine.requests == 0)
        assert server.engine.metrics.aborted.values[""] == 1
        assert server.engine.metrics.slow_clients.values == {}


async def test_lateness_and_tokens_are_exported() -> None:
    async with serving(config()) as (_, client):
        await answer(client, "/v1/completions", {"prompt": "a", "max_tokens": 5, "stream": True})
        _, page = await answer(client, "/metrics", method="GET")
    count = next(line for line in page.splitlines() if line.startswith("pdbench_emulator_token_lateness_seconds_count"))
    assert count.endswith(" 5")


# ---- control


async def test_slow_down_slows_every_step_until_it_is_null() -> None:
    body = {"text": "a", "sampling_params": {"max_new_tokens": 10}}
    async with serving(config()) as (server, client):
        for value, kept in ((0.05, 0.05), (None, None), (0.05, 0.05), (-1, None)):
            assert await answer(client, "/slow_down", {"forward_sleep_time": value}) == (200, None)
            assert server.engine.slow_down_s == kept
            assert (await answer(client, "/server_info", method="GET"))[1]["slow_down_s"] == kept
            latency = (await answer(client, "/generate", body))[1]["meta_info"]["e2e_latency"]
            # ten tokens are at least nine steps
            assert latency > 0.45 if kept else True
        assert (await answer(client, "/slow_down", {"forward_sleep_time": 0.1}, "GET"))[0] == 200
        bodies: list[object] = [{}, {"forward_sleep_time": "x"}, {"forward_sleep_time": True}, []]
        for bad in bodies:
            status, said = await answer(client, "/slow_down", bad)
            assert (status, "forward_sleep_time" in said["message"] or "object" in said["message"]) == (422, True)
        assert server.engine.slow_down_s == 0.1


def steps(path: Path) -> list[dict[str, Any]]:
    trace = json.loads(gzip.decompress(path.read_bytes()))
    assert trace["emulated"]
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


async def test_a_profile_of_so_many_steps_ends_by_itself(tmp_path: Path) -> None:
    async with serving(config()) as (_, client):
        wanted = {"output_dir": str(tmp_path / "new"), "num_steps": 4, "profile_id": "id", "profile_prefix": "pre"}
        assert await answer(client, "/start_profile", wanted) == (200, "Start profiling.\n")
        assert (await answer(client, "/start_profile", wanted))[0] == 500
        assert (await answer(client, "/server_info", method="GET"))[1]["profiling"] is True
        await answer(client, "/generate", {"text": "a b c", "sampling_params": {"max_new_tokens": 10}})
        assert (await answer(client, "/server_info", method="GET"))[1]["profiling"] is False
        assert (await answer(client, "/stop_profile"))[0] == 500
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == "pre-id-TP-0.trace.json.gz"
    found = steps(path)
    assert [event["args"]["tokens"] for event in found] == [3, 1, 1, 1]
    assert all(event["dur"] > 0 for event in found)
    assert [event["ts"] for event in found] == sorted(event["ts"] for event in found)


async def test_a_profile_by_stage_and_one_that_starts_late(tmp_path: Path) -> None:
    work = {"text": "a b c", "sampling_params": {"max_new_tokens": 10}}
    async with serving(config()) as (_, client):
        wanted = {"output_dir": str(tmp_path), "num_steps": 2, "profile_by_stage": True, "profile_id": "s"}
        await answer(client, "/start_profile", wanted)
        await answer(client, "/generate", work)
        await answer(client, "/generate", {**work, "text": "d e f g"})
        # 20 steps are over: this one starts at the 25th
        await answer(client, "/start_profile", {"output_dir": str(tmp_path), "start_step": 25, "profile_id": "late"})
        await answer(client, "/generate", work)
        assert (await answer(client, "/stop_profile"))[0] == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "late-TP-0.trace.json.gz",
        "s-TP-0-DECODE.trace.json.gz",
        "s-TP-0-EXTEND.trace.json.gz",
    ]
    assert [event["args"]["tokens"] for event in steps(tmp_path / "s-TP-0-EXTEND.trace.json.gz")] == [3, 4]
    assert [event["args"]["tokens"] for event in steps(tmp_path / "s-TP-0-DECODE.trace.json.gz")] == [1, 1]
    assert len(steps(tmp_path / "late-TP-0.trace.json.gz")) == 30 - 24


async def test_a_worker_of_one_role_has_one_stage(tmp_path: Path) -> None:
    wanted = {"output_dir": str(tmp_path), "num_steps": 1, "profile_by_stage": True, "profile_id": "s"}
    fake = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 1}
    async with serving(config(role="prefill")) as (_, client):
        status, reply = await answer(client, "/start_profile", {**wanted, "profile_stages": ["decode"]})
        assert (status, "only has prefill steps" in reply["message"]) == (400, True)
        await answer(client, "/start_profile", wanted)
        await answer(client, "/generate", {"text": "a b c", "sampling_params": {"max_new_tokens": 10}, **fake})
        assert (await answer(client, "/server_info", method="GET"))[1]["profiling"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["s-TP-0-EXTEND.trace.json.gz"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"merge_profiles": True}, 400, "merge_profiles"),
        ({"num_steps": 0}, 422, "num_steps must be a whole number above 0"),
        ({"start_step": "x"}, 422, "start_step must be"),
        ({"profile_id": "../x"}, 422, "profile_id must be text without /"),
        ({"profile_by_stage": True}, 400, "profile_by_stage needs num_steps"),
        ({"profile_stages": ["decod"]}, 422, "profile_stages must be a list of prefill and decode"),
        ({"output_dir": "/proc/no"}, 400, "output_dir /proc/no cannot be written"),
    ],
)
async def test_profiles_that_are_refused(body: object, status: int, said: str) -> None:
    async with serving(config()) as (_, client):
        found, reply = await answer(client, "/start_profile", body)
        assert (found, said in reply["message"]) == (status, True), reply
        assert (await answer(client, "/server_info", method="GET"))[1]["profiling"] is False


async def test_flush_cache_waits_for_requests_or_refuses() -> None:
    async with serving(config()) as (server, client):
        words = " ".join(f"w{n}" for n in range(300))
        whole = {"text": words, "sampling_params": {"max_new_tokens": 2}}
        assert (await answer(client, "/generate", whole))[1]["meta_info"]["cached_tokens"] == 0
        assert (await answer(client, "/generate", whole))[1]["meta_info"]["cached_tokens"] > 250
        status, text = await answer(client, "/flush_cache", method="GET")
        assert (status, text.startswith("Cache flushed.\n")) == (200, True)
        assert (await answer(client, "/generate", whole))[1]["meta_info"]["cached_tokens"] == 0
        running = asyncio.ensure_future(answer(client, "/generate", LONG))
        await until(lambda: server.engine.requests == 1)
        assert (await answer(client, "/flush_cache"))[0] == 400
        waiting = asyncio.ensure_future(answer(client, "/flush_cache?timeout=30"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await answer(client, "/abort_request", {"abort_all": True})
        assert (await waiting)[0] == 200
        await running
        assert (await answer(client, "/flush_cache?timeout=-1"))[0] == 422


async def test_abort_request_ends_the_one_that_is_meant() -> None:
    async with serving(config()) as (server, client):
        whole = asyncio.ensure_future(answer(client, "/generate", LONG))
        streamed = await client.post(
            "/v1/completions", json={"prompt": "x", "max_tokens": 20_000, "stream": True, "rid": "other"}
        )
        await until(lambda: server.engine.requests == 2 and all(job.sent > 2 for job in server.engine.jobs()))
        for nothing in ({"rid": "nobody"}, {"rid": ""}, {}):
            assert (await answer(client, "/abort_request", nothing))[0] == 200
        assert server.engine.requests == 2
        await answer(client, "/abort_request", {"rid": "long"})
        status, body = await whole
        assert (status, body["meta_info"]["finish_reason"]["type"], body["meta_info"]["id"]) == (200, "abort", "long")
        assert 0 < body["meta_info"]["completion_tokens"] == len(body["output_ids"]) < 20_000
        assert [job.item.rid for job in server.engine.jobs()] == ["other"]
        await answer(client, "/abort_request", {"abort_all": True})
        chunks = await events(streamed)
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["abort"]
        assert (await answer(client, "/abort_request", {"rid": 5}))[0] == 422


async def test_role_switch_needs_its_flag_a_disaggregated_idle_worker_and_a_role() -> None:
    async def switch(client: Client, role: object) -> tuple[int, str]:
        status, body = await answer(client, "/pd_role_switch", {"new_role": role})
        assert body["success"] == (status == 200)
        return status, body["message"]

    async with serving(config(role="decode")) as (_, client):
        assert await switch(client, "prefill") == (400, "--enable-pd-role-switch is not set on this server")
    async with serving(config(enable_pd_role_switch=True)) as (_, client):
        assert await switch(client, "prefill") == (400, "instance is not running in PD disaggregation mode")
    async with serving(config(role="decode", enable_pd_role_switch=True)) as (server, client):
        assert (await switch(client, "aggregated"))[0] == 400
        assert await switch(client, "decode") == (200, "already in target role")
        fake = {**LONG, "bootstrap_host": "2.2.2.2", "bootstrap_room": 1}
        running = asyncio.ensure_future(answer(client, "/generate", fake))
        await until(lambda: server.engine.requests == 1)
        assert await switch(client, "prefill") == (400, "instance is not idle; drain all requests before switching")
        await answer(client, "/abort_request", {"abort_all": True})
        await running
        assert await switch(client, "prefill") == (200, "ok")
        assert (await answer(client, "/server_info", method="GET"))[1]["disaggregation_mode"] == "prefill"
        assert (await answer(client, "/v1/loads", method="GET"))[1]["loads"][0]["disaggregation"]["mode"] == "prefill"
        assert 'engine_type="prefill"' in (await answer(client, "/metrics", method="GET"))[1]


async def test_loads_say_what_is_there() -> None:
    async with serving(config(max_running_requests=1)) as (server, client):
        running = [asyncio.ensure_future(answer(client, "/generate", {**LONG, "rid": f"r{n}"})) for n in range(2)]
        await until(lambda: any(job.sent > 50 for job in server.engine.jobs()))
        (load,) = (await answer(client, "/v1/loads", method="GET"))[1]["loads"]
        assert (load["num_running_reqs"], load["num_waiting_reqs"], load["queues"]["waiting"]) == (1, 1, 1)
        assert load["num_used_tokens"] > 50
        assert load["token_usage"] == pytest.approx(load["num_used_tokens"] / 100_000, abs=1e-4)
        assert load["memory"]["token_capacity"] == load["max_total_num_tokens"] == 100_000
        assert load["memory"]["weight_gb"] > 0
        assert load["gen_throughput"] > 0
        (core,) = (await answer(client, "/v1/loads?include=core", method="GET"))[1]["loads"]
        assert not {"memory", "queues", "disaggregation"} & set(core)
        await answer(client, "/abort_request", {"abort_all": True})
        await asyncio.gather(*running)


async def test_keys() -> None:
    async with serving(config(api_key="api", admin_api_key="admin", allow_faults=True)) as (_, client):
        for path in ("/server_info", "/v1/models", "/v1/loads"):
            found = [(await answer(client, path, method="GET", key=key))[0] for key in ("", "api", "admin")]
            assert found == [401, 200, 401], path
        for path in ("/flush_cache", "/emulated/fault", "/slow_down", "/start_profile", "/stop_profile"):
            found = [(await answer(client, path, method="GET", key=key))[0] for key in ("", "api", "admin")]
            assert found[:2] == [401, 401], path
            assert found[2] != 401, path
        for path in ("/abort_request", "/pd_role_switch"):
            found = [(await answer(client, path, {}, key=key))[0] for key in ("", "api", "admin")]
            assert found[:2] == [401, 401], path
            assert found[2] != 401, path
        assert (await answer(client, "/health", method="GET"))[0] == 200
        assert (await answer(client, "/metrics", method="GET"))[0] == 200


# ---- faults


async def test_faults_need_the_flag() -> None:
    async with serving(config()) as (server, client):
        for method in ("GET", "POST", "DELETE"):
            status, body = await answer(client, "/emulated/fault", {"kind": "corrupt"}, method)
            assert (status, "--allow-faults" in body["error"]) == (403, True)
        assert server.engine.faults.active == []


async def test_faults_are_set_shown_and_cleared(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(config(allow_faults=True)) as (_, client):
        assert (await answer(client, "/emulated/fault", {"kind": "corrupt", "count": 2}))[0] == 200
        shown = [{"kind": "corrupt", "count": 2}]
        assert (await answer(client, "/emulated/fault", method="GET"))[1] == {"faults": shown}
        assert (await answer(client, "/server_info", method="GET"))[1]["faults"] == shown
        assert "FAULT ON REQUEST" in caplog.text
        status, body = await answer(client, "/emulated/fault", {"kind": "corrup"})
        assert (status, "did you mean corrupt?" in body["error"]) == (400, True)
        assert (await answer(client, "/emulated/fault", method="DELETE"))[1] == {"faults": []}
        assert (await answer(client, "/server_info", method="GET"))[1]["faults"] == []


ASKS: dict[str, dict[str, Any]] = {
    "/generate": {"text": "a b", "sampling_params": {"max_new_tokens": 4}},
    "/v1/completions": {"prompt": "a b", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a b"}], "max_tokens": 4},
}


def text_in(choice: dict[str, Any]) -> str:
    return str(choice.get("text") or choice.get("delta", {}).get("content") or "")


@pytest.mark.parametrize("path", sorted(ASKS))
async def test_zero_tokens_is_a_success_without_output(path: str) -> None:
    async with serving(config(allow_faults=True)) as (_, client):
        await answer(client, "/emulated/fault", {"kind": "zero_tokens"})
        status, whole = await answer(client, path, ASKS[path])
        usage = whole["meta_info"] if path == "/generate" else whole["usage"]
        assert (status, usage["completion_tokens"]) == (200, 0)
        async with client.post(path, json={**ASKS[path], "stream": True, "stream_options": {"include_usage": True}}) as reply:
            chunks = await events(reply)
        if path == "/generate":
            assert [(chunk["text"], chunk["output_ids"]) for chunk in chunks] == [("", [])]
            assert chunks[0]["meta_info"]["finish_reason"]["type"] == "length"
        else:
            assert chunks[-1]["usage"]["completion_tokens"] == 0
            (choice,) = [choice for chunk in chunks for choice in chunk["choices"]]
            assert choice["finish_reason"] == "length"
            assert not text_in(choice)


@pytest.mark.parametrize("path", sorted(ASKS))
async def test_an_empty_first_chunk_comes_before_the_prefill(path: str) -> None:
    async with serving(config(allow_faults=True)) as (server, client):
        await answer(client, "/emulated/fault", {"kind": "empty_first_chunk"})
        await answer(client, "/slow_down", {"forward_sleep_time": 30})
        reply = await client.post(path, json={**ASKS[path], "stream": True})
        first = json.loads((await reply.content.readline()).removeprefix(b"data: "))
        assert server.engine.jobs()[0].sent == 0
        if path == "/generate":
            assert (first["text"], first["output_ids"], first["meta_info"]["completion_tokens"]) == ("", [], 0)
        else:
            choice = first["choices"][0]
            assert not text_in(choice)
            assert choice["finish_reason"] is None
        reply.close()


async def test_a_hanging_worker_answers_nothing_until_it_is_cleared() -> None:
    async with serving(config(allow_faults=True)) as (server, client):
        stream = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 40, "stream": True})
        await stream.content.readline()
        await answer(client, "/emulated/fault", {"kind": "hang"})
        health = asyncio.ensure_future(answer(client, "/health", method="GET"))
        whole = asyncio.ensure_future(answer(client, "/generate", ASKS["/generate"]))
        await until(lambda: server.engine.requests == 0)
        await asyncio.sleep(0.2)
        assert not health.done()
        assert not whole.done()
        assert not stream.content.at_eof()
        await answer(client, "/emulated/fault", method="DELETE")
        assert (await health)[0] == 200
        assert (await whole)[0] == 200
        assert b"[DONE]" in await stream.content.read()


async def test_a_worker_dies_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr("pdbench.emulate.faults.os.kill", lambda pid, number: killed.append(number))
    async with serving(config(allow_faults=True)) as (_, client):
        await answer(client, "/emulated/fault", {"kind": "die", "after_tokens": 6})
        await answer(client, "/generate", ASKS["/generate"])
        assert killed == []
        await answer(client, "/v1/completions", {**ASKS["/v1/completions"], "stream": True})
        assert killed[0] == 9
        await answer(client, "/emulated/fault", {"kind": "clear"})
        killed.clear()
        assert (await answer(client, "/emulated/fault", {"kind": "die"}))[0] == 200
        await until(lambda: killed == [9])


# ---- memory


@pytest.mark.parametrize("role", ["aggregated", "prefill", "decode"])
async def test_an_ended_request_is_gone_without_the_collector(monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    kept: list[weakref.ref[Job]] = []
    start = Engine.start

    def started(engine: Engine, *given: Any) -> Job:
        job = start(engine, *given)
        kept.append(weakref.ref(job))
        return job

    monkeypatch.setattr(Engine, "start", started)
    alone = {} if role == "aggregated" else {"bootstrap_host": "2.2.2.2", "bootstrap_port": 8998, "bootstrap_room": 0}
    async with serving(config(role=role)) as (server, client):
        gc.collect()
        gc.disable()
        try:
            for stream in (True, False):
                body = {"text": "a b c", "sampling_params": {"max_new_tokens": 3}, "stream": stream, **alone}
                assert (await answer(client, "/generate", body))[0] == 200
            if role != "prefill":  # whose answer is one token
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(answer(client, "/generate", {**LONG, **alone}), 0.2)
                await until(lambda: server.engine.requests == 0)
            await until(lambda: all(job() is None for job in kept))
        finally:
            gc.enable()
    assert len(kept) == (2 if role == "prefill" else 3)
