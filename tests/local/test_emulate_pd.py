"""Prefill and decode workers without a router: the handshake, and everything that can go wrong in it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiohttp import web
from emulated_workers import Service, call, events, free_port, pair, pd_body, profile_file, service, wait_for, worker

from pdbench.emulate.text import encode, prompt_of
from pdbench.model import profile
from pdbench.model.rates import Rates

ROOMS = itertools.count(2**62)
PROMPT = "to be or not to be"
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"text": PROMPT, "sampling_params": {"max_new_tokens": 6}},
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 6},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6},
}


class Trio(NamedTuple):
    prefill: Service
    decode: Service
    aggregated: Service


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    quick = profile_file(tmp_path_factory.mktemp("trio"))
    with (
        worker("prefill", quick, "--node", "one") as prefill,
        worker("decode", quick, "--node", "other") as decode,
        worker("aggregated", quick) as aggregated,
    ):
        yield Trio(prefill, decode, aggregated)


def without_ids(answer: Any) -> Any:
    """Drop what differs from request to request."""
    if isinstance(answer, dict):
        return {key: without_ids(value) for key, value in answer.items() if key not in ("id", "created", "e2e_latency")}
    return [without_ids(part) for part in answer] if isinstance(answer, list) else answer


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_output_equals_that_of_an_aggregated_worker(trio: Trio, path: str, stream: bool) -> None:
    body = {**BODIES[path], "stream": stream}
    (prefill_status, prefill_data), (status, data) = pair(
        trio.prefill, trio.decode, path, pd_body(trio.prefill, next(ROOMS), body)
    )
    assert (prefill_status, status) == (200, 200), data
    alone = trio.aggregated.post(path, body)[1]
    if stream:
        assert without_ids(events(data)) == without_ids(events(alone))
        assert events(prefill_data)
    else:
        assert without_ids(json.loads(data)) == without_ids(json.loads(alone))
        short = json.loads(prefill_data)
        assert (short["meta_info"] if path == "/generate" else short["usage"])["completion_tokens"] == 1


def test_roles_are_told(trio: Trio) -> None:
    assert [worker.json("/server_info")["disaggregation_mode"] for worker in trio] == ["prefill", "decode", "null"]
    page = trio.prefill.get("/metrics")[1].decode()
    assert 'engine_type="prefill"' in page
    assert trio.prefill.json("/v1/loads?include=disagg")["loads"][0]["disaggregation"]["mode"] == "prefill"


def test_books_of_both_sides(trio: Trio) -> None:
    before = [worker.metrics() for worker in (trio.prefill, trio.decode)]
    words = " ".join(["word"] * 512)
    body = pd_body(trio.prefill, next(ROOMS), {"prompt": words, "max_tokens": 5})
    pair(trio.prefill, trio.decode, "/v1/completions", body)
    after = [worker.metrics() for worker in (trio.prefill, trio.decode)]
    prefill, decode = ({key: new[key] - old.get(key, 0) for key in new} for old, new in zip(before, after, strict=True))
    assert prefill["kv_transfer_total_mb_sum"] == pytest.approx(18)
    tiny = Rates(profile.load("tiny"))  # on two nodes without RDMA it is TCP
    expected_ms = tiny.transfer_s(tiny.kv_bytes(512), "tcp") * 1e3 + tiny.profile.transports["tcp"].latency_ms
    assert prefill["kv_transfer_latency_ms_sum"] == pytest.approx(expected_ms)
    assert prefill["kv_transfer_total_mb_count"] == prefill["kv_transfer_speed_gb_s_count"] == 1
    assert "kv_transfer_total_mb_count" not in decode
    assert decode["kv_transfer_bootstrap_ms_count"] == 1
    for side, tokens in ((prefill, 1), (decode, 5)):
        assert side["num_requests_total"] == 1
        assert side["prompt_tokens_total"] == 512
        assert side["generation_tokens_total"] == tokens
        assert side.get("num_bootstrap_failed_reqs_total", 0) == side.get("num_transfer_failed_reqs_total", 0) == 0
    assert "time_to_first_token_seconds_count" not in prefill
    assert decode["time_to_first_token_seconds_count"] == 1


def test_batches_meet_in_a_room_each(trio: Trio) -> None:
    body = {"prompt": ["a b", "c d e"], "max_tokens": 3}
    first, second = next(ROOMS), next(ROOMS)
    lists = {
        **body,
        "bootstrap_host": ["127.0.0.1"] * 2,
        "bootstrap_port": [trio.prefill.bootstrap_port] * 2,
        "bootstrap_room": [first, second],
    }
    (status, _), (decode_status, data) = pair(trio.prefill, trio.decode, "/v1/completions", lists)
    assert (status, decode_status) == (200, 200)
    assert without_ids(json.loads(data)) == without_ids(trio.aggregated.json("/v1/completions", body))


@pytest.mark.parametrize("path", BODIES)
def test_a_missing_room_is_a_400_at_once(trio: Trio, path: str) -> None:
    for made in (trio.prefill, trio.decode):
        for stream in (False, True):
            status, data = made.post(path, {**BODIES[path], "stream": stream})
            assert status == 400
            assert b"without bootstrap room id" in data
    assert trio.decode.post(path, {**BODIES[path], "bootstrap_room": 1})[0] == 400  # a room, but no host


@pytest.mark.parametrize("path", BODIES)
def test_the_warm_up_address_works_on_one_worker_alone(trio: Trio, path: str) -> None:
    for made in (trio.prefill, trio.decode):
        for room in ({"bootstrap_room": 0}, {}):
            assert made.post(path, {**BODIES[path], "bootstrap_host": "2.2.2.2", **room})[0] == 200
    answer = trio.decode.json(path, {**BODIES[path], "bootstrap_host": "2.2.2.2", "bootstrap_room": 0})
    # no KV came, so the text is not that of the prompt
    assert without_ids(answer) != without_ids(trio.aggregated.json(path, BODIES[path]))


def test_a_null_bootstrap_port_is_the_decodes_own(tmp_path: Path) -> None:
    quick, port = profile_file(tmp_path), str(free_port())
    with (
        worker("prefill", quick, "--bootstrap-port", port) as prefill,
        worker("decode", quick, "--disaggregation-bootstrap-port", port) as decode,
    ):
        body = {**pd_body(prefill, next(ROOMS), BODIES["/generate"]), "bootstrap_port": None}
        assert pair(prefill, decode, "/generate", body)[1][0] == 200


def test_decode_waits_for_its_prefill_in_either_order(trio: Trio) -> None:
    for first, second in ((trio.prefill, trio.decode), (trio.decode, trio.prefill)):
        body, got = pd_body(trio.prefill, next(ROOMS), BODIES["/generate"]), []
        early = threading.Thread(target=lambda: got.append(first.post("/generate", body)))  # noqa: B023 - joined below
        early.start()
        wait_for(lambda: first.json("/get_load")[0]["num_reqs"] == 1, "there")  # noqa: B023
        time.sleep(0.2)
        assert not got
        assert second.post("/generate", body)[0] == 200
        early.join()
        assert got[0][0] == 200


def test_a_dead_prefill_is_a_500_after_the_retries(tmp_path: Path) -> None:
    figures = profile_file(tmp_path, bootstrap_attempts=5, bootstrap_interval_s=0.2)
    with worker("decode", figures) as decode:
        nobody = {"bootstrap_host": "127.0.0.1", "bootstrap_port": free_port(), "bootstrap_room": 1}
        for path, body in BODIES.items():
            begun = time.monotonic()
            status, data = decode.post(path, {**body, **nobody})
            assert status == 500
            assert b"Decode handshake failed for request" in data
            assert b"KVTransferError(bootstrap_room=1): Aborted by AbortReq." in data
            assert time.monotonic() - begun > 0.75  # four pauses
        assert (
            f"Could not fetch prefill parallel info from 127.0.0.1:{nobody['bootstrap_port']} after 5" in decode.log.read_text()
        )
        chunk = events(decode.post("/v1/completions", {**BODIES["/v1/completions"], **nobody, "stream": True})[1])[-1]
        assert chunk["error"]["code"] == 500
        chunk = events(decode.post("/generate", {**BODIES["/generate"], **nobody, "stream": True})[1])[-1]
        assert chunk["meta_info"]["finish_reason"]["type"] == "abort"
        metrics = decode.metrics()
        assert metrics["num_bootstrap_failed_reqs_total"] == 5
        assert metrics["generation_tokens_total"] == 0
        assert metrics["num_decode_prealloc_queue_reqs"] == metrics["num_decode_transfer_queue_reqs"] == 0


def test_a_prefill_that_dies_in_the_transfer_is_a_500_after_the_heartbeats(tmp_path: Path) -> None:
    env = {"SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "0.2"}
    slow = profile_file(tmp_path, prefill_overhead_ms=30_000)
    with worker("prefill", slow) as prefill, worker("decode", slow, env=env) as decode:
        body, got = pd_body(prefill, next(ROOMS), BODIES["/generate"]), []
        both = threading.Thread(target=lambda: got.append(decode.post("/generate", body)))
        both.start()
        lost = threading.Thread(target=post_to_the_dying, args=(prefill, body))
        lost.start()
        wait_for(lambda: decode.metrics()["num_decode_transfer_queue_reqs"] == 1, "in transfer")
        prefill.process.kill()
        both.join()
        lost.join()
        status, data = got[0]
        assert status == 500
        assert b"Decode transfer failed for request" in data
        assert b"Lost connection with prefill instance" in data
        assert "Lost connection with prefill instance" in decode.log.read_text()
        assert decode.metrics()["num_transfer_failed_reqs_total"] == 1


def test_a_prefill_that_is_back_before_it_is_missed_leaves_its_requests_to_their_limit(tmp_path: Path) -> None:
    """As in SGLang, whose heartbeat asks the address and not the process."""
    env = {"SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2", "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "6"}
    slow = profile_file(tmp_path, prefill_overhead_ms=30_000)
    with worker("decode", slow, env=env) as decode, contextlib.ExitStack() as stack:
        prefill = stack.enter_context(worker("prefill", slow))
        body, got = pd_body(prefill, next(ROOMS), BODIES["/generate"]), []
        both = threading.Thread(target=lambda: got.append(decode.post("/generate", body)))
        both.start()
        lost = threading.Thread(target=post_to_the_dying, args=(prefill, body))
        lost.start()
        wait_for(lambda: decode.metrics()["num_decode_transfer_queue_reqs"] == 1, "in transfer")
        prefill.process.kill()
        prefill.process.wait()
        again = [sys.executable, "-m", "pdbench", "emulate", "--role", "prefill", "--profile", str(slow)]
        again += ["--port", prefill.url.rpartition(":")[2], "--bootstrap-port", str(prefill.bootstrap_port)]
        stack.enter_context(service(again, prefill.url, "/ready"))
        both.join()
        lost.join()
        status, data = got[0]
        assert status == 500
        assert b"timed out after 6.0s in KVPoll.WaitingForInput" in data


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_request_that_its_client_gives_up_is_a_failure_in_the_books(tmp_path: Path, role: str) -> None:
    """As in SGLang: what waited for the other side when its client left is counted, and stands in the log."""
    quick = profile_file(tmp_path)
    with worker(role, quick) as alone:
        body = {**pd_body(alone, 7, BODIES["/generate"]), "bootstrap_port": free_port()}
        connection = http.client.HTTPConnection(alone.url.removeprefix("http://"))
        connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
        wait_for(lambda: alone.json("/get_load")[0]["num_reqs"] == 1, "waiting")
        connection.close()
        wait_for(lambda: alone.metrics().get("num_bootstrap_failed_reqs_total") == 1, "counted")
        assert "with exception KVTransferError(bootstrap_room=7): Aborted by AbortReq." in alone.log.read_text()


def test_a_decode_worker_that_dies_is_missed_by_transfers_alone(tmp_path: Path) -> None:
    """As in SGLang: prefill learns of it when it sends; a request that decode had no memory for yet waits on."""
    figures = profile_file(tmp_path, prefill_overhead_ms=3_000)
    with worker("prefill", figures) as prefill, worker("decode", figures, "--max-total-tokens", "600") as decode:
        got: list[tuple[int, bytes]] = []

        def to_prefill(body: dict[str, Any]) -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):  # one still waits at the end
                got.append(prefill.post("/generate", body))

        threads = []
        for _ in range(2):  # decode has room for one of them, with its reserve
            body = pd_body(prefill, next(ROOMS), {**BODIES["/generate"], "text": "word " * 60})
            threads.append(threading.Thread(target=to_prefill, args=(body,), daemon=True))
            threads.append(threading.Thread(target=post_to_the_dying, args=(decode, body), daemon=True))
        for thread in threads:
            thread.start()
        wait_for(lambda: prefill.metrics()["num_prefill_bootstrap_queue_reqs"] == 1, "one in prefill, one waiting")
        wait_for(lambda: prefill.metrics()["num_running_reqs"] == 1, "in prefill")
        decode.process.kill()
        wait_for(lambda: got, "failed")
        assert got[0][0] == 500
        assert b"Prefill transfer failed for request" in got[0][1]
        assert b"Decode instance could be dead" in got[0][1]
        time.sleep(0.5)
        assert len(got) == 1
        assert prefill.metrics()["num_prefill_bootstrap_queue_reqs"] == 1


def post_to_the_dying(made: Service, body: object) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        made.post("/generate", body)


def test_a_prefill_whose_decode_never_comes_times_out(tmp_path: Path) -> None:
    env = {"SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "0.5"}
    with worker("prefill", profile_file(tmp_path), env=env) as prefill:
        status, data = prefill.post("/generate", pd_body(prefill, 5, BODIES["/generate"]))
        assert status == 500
        assert b"Prefill bootstrap failed for request" in data
        assert b"timed out after 0.5s in KVPoll.Bootstrapping" in data
        metrics = prefill.metrics()
        assert metrics["num_bootstrap_failed_reqs_total"] == 1
        assert metrics["num_prefill_bootstrap_queue_reqs"] == 0
        assert "kv_transfer_total_mb_count" not in metrics
        # the room is free again
        assert b"KVPoll.Bootstrapping" in prefill.post("/generate", pd_body(prefill, 5, BODIES["/generate"]))[1]


def test_a_decode_whose_kv_never_comes_times_out(tmp_path: Path) -> None:
    env = {"SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "0.5"}
    quick = profile_file(tmp_path)
    with worker("prefill", quick) as prefill, worker("decode", quick, env=env) as decode:
        status, data = decode.post("/generate", pd_body(prefill, 5, BODIES["/generate"]))
        assert status == 500
        assert b"KVTransferError(bootstrap_room=5): Request 5 timed out after 0.5s in KVPoll.WaitingForInput" in data
        assert decode.metrics()["num_transfer_failed_reqs_total"] == 1
        # the prefill forgot that visit: the same room works when both come
        body = pd_body(prefill, 5, BODIES["/generate"])
        wait_for(lambda: pair(prefill, decode, "/generate", body)[1][0] == 200, "usable again", 20)


def test_when_one_side_leaves_the_other_fails(tmp_path: Path) -> None:
    slow = profile_file(tmp_path, prefill_overhead_ms=30_000)
    with worker("prefill", slow) as prefill, worker("decode", slow) as decode:
        for failures, (leaver, stayer) in enumerate(((prefill, decode), (decode, prefill)), 1):
            body, got = pd_body(prefill, next(ROOMS), BODIES["/generate"]), []
            stays = threading.Thread(target=lambda: got.append(stayer.post("/generate", body)))  # noqa: B023
            stays.start()
            connection = http.client.HTTPConnection(leaver.url.removeprefix("http://"))
            connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
            wait_for(lambda: prefill.metrics()["num_running_reqs"] == 1, "in prefill")
            connection.close()
            stays.join(30)
            assert got
            assert got[0][0] == 500
            wait_for(lambda: leaver.metrics().get("num_aborted_requests_total") == 1, "counted")  # noqa: B023
            assert stayer.metrics()["num_transfer_failed_reqs_total"] == failures
            assert leaver.metrics()["num_transfer_failed_reqs_total"] == failures
            assert prefill.metrics()["num_running_reqs"] == 0


def test_kv_of_another_prompt_or_shape_is_never_a_success(trio: Trio, tmp_path: Path) -> None:
    room = next(ROOMS)
    one, other = ({**BODIES["/generate"], "text": text} for text in (PROMPT, "to be or not to go"))
    got: list[tuple[int, bytes]] = []
    send = threading.Thread(target=lambda: got.append(trio.prefill.post("/generate", pd_body(trio.prefill, room, one))))
    send.start()
    status, data = trio.decode.post("/generate", pd_body(trio.prefill, room, other))
    send.join()
    assert status == 500
    assert b"is not that of this prompt" in data
    with worker("decode", profile_file(tmp_path, kv_heads=4)) as misfit:
        answers = pair(trio.prefill, misfit, "/generate", pd_body(trio.prefill, next(ROOMS), one))
        assert answers[1][0] == 500
        assert misfit.metrics()["num_transfer_failed_reqs_total"] == 1


@contextlib.contextmanager
def forged_prefill(kv: str | None) -> Iterator[int]:
    """A bootstrap server that finds every room and answers a grant with this text (None: it knows no WebSockets)."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if kv is None:
            return web.Response(text="<html>")
        socket = web.WebSocketResponse(timeout=0.3)
        await socket.prepare(request)
        sockets.append(socket)
        async for message in socket:
            said = json.loads(message.data)
            if "ask" in said:
                await socket.send_str(json.dumps({"found": said["ask"]}))
            elif "grant" in said:
                await socket.send_str(kv)
        return socket

    async def shut(_: web.Application) -> None:
        for socket in sockets:
            await socket.close()

    sockets: list[web.WebSocketResponse] = []

    async def serve() -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.add_routes([web.get("/emulated/kv", answer)])
        app.on_shutdown.append(shut)
        runner, port = web.AppRunner(app, shutdown_timeout=0), free_port()
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return runner, port

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner, port = asyncio.run_coroutine_threadsafe(serve(), loop).result(10)
    try:
        yield port
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_output_is_made_from_the_kv_message_alone(trio: Trio) -> None:
    """A forged message that passes for this prompt works; what does not is an error."""
    prompt = prompt_of(encode(PROMPT))
    proof = {"tokens": prompt.tokens, "digest": prompt.digest.hex(), "bytes": prompt.tokens * 36864}
    good = {"kv": 1, **proof, "transport": "tcp", "cached": 0, "unchecked": False}
    for message, status in (
        (json.dumps(good), 200),
        (json.dumps({**good, "digest": bytes(32).hex()}), 500),
        (json.dumps({**good, "tokens": 5}), 500),
        (json.dumps({**good, "bytes": 0}), 500),
        (json.dumps({"kv": 1}), 500),
        ("hello", 500),
        ("3", 500),
        (None, 500),
    ):
        with forged_prefill(message) as port:
            body = {**BODIES["/generate"], "bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": 1}
            got, data = trio.decode.post("/generate", body)
            assert got == status, (message, data)
            if message in ("hello", "3", None):
                assert b"is not an emulated prefill worker" in data


def test_the_bootstrap_port_answers_health_and_refuses_nonsense(trio: Trio) -> None:
    base = f"http://127.0.0.1:{trio.prefill.bootstrap_port}"
    assert call(f"{base}/health", None) == (200, b"OK")
    assert call(f"{base}/emulated/kv", None)[0] == 400  # no WebSocket


def test_a_room_is_for_one_request(tmp_path: Path) -> None:
    with worker("prefill", profile_file(tmp_path), env={"SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "2"}) as prefill:
        body, got = pd_body(prefill, 9, BODIES["/generate"]), []
        first = threading.Thread(target=lambda: got.append(prefill.post("/generate", body)))
        first.start()
        wait_for(lambda: prefill.metrics()["num_prefill_bootstrap_queue_reqs"] == 1, "waiting")
        status, data = prefill.post("/generate", body)
        assert status == 500
        assert b"already in use" in data
        first.join()
        assert b"KVPoll.Bootstrapping" in got[0][1]
