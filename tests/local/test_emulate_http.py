"""One aggregated worker: every endpoint's shape, the three generate routes, their schedule and their books."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from emulated_workers import Service, events, profile_file, wait_for, worker

PROMPT = "to be or not to be"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    names = ("--model-path", "org/model", "--served-model-name", "short")
    options = (*names, "--tp-size", "2", "--max-running-requests", "32", "--disable-radix-cache")
    with worker("aggregated", profile_file(tmp_path_factory.mktemp("one")), *options) as made:
        yield made


def ask(path: str, tokens: int, **more: Any) -> dict[str, Any]:
    if path == "/generate":
        return {"text": PROMPT, "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}, **more}
    prompt = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    return {"model": "short", "max_tokens": tokens, "ignore_eos": True, **prompt, **more}


ROUTES = ["/generate", "/v1/completions", "/v1/chat/completions"]


def text_of(path: str, answer: Any) -> str:
    if path == "/generate":
        return str(answer["text"])
    choice = answer["choices"][0]
    return str(choice["message"]["content"] if "chat" in path else choice["text"])


def test_probes_and_info(one: Service) -> None:
    for path in ("/ready", "/health", "/health_generate"):
        assert one.get(path) == (200, b"")
    info = one.json("/server_info")
    assert info == one.json("/get_server_info")
    wanted = {
        "emulated": True,
        "served_model_name": "short",
        "model_path": "org/model",
        "disaggregation_mode": "null",
        "tp_size": 2,
        "dp_size": 1,
        "max_running_requests": 32,
        "context_length": 32768,
    }
    assert {key: info[key] for key in wanted} == wanted
    assert "emulated" in info["version"]
    assert one.json("/model_info") == one.json("/get_model_info")
    assert one.json("/model_info")["model_path"] == "org/model"
    (card,) = one.json("/v1/models")["data"]
    assert (card["id"], card["owned_by"], card["max_model_len"]) == ("short", "sglang", 32768)


def test_loads(one: Service) -> None:
    loads = one.json("/v1/loads")
    assert loads["loads"][0]["disaggregation"]["mode"] == "null"
    assert loads["loads"][0]["num_running_reqs"] == 0
    assert "disaggregation" not in one.json("/v1/loads?include=core")["loads"][0]
    assert one.get("/v1/loads?include=nonsense")[0] == 400
    assert one.json("/get_load") == [{"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}]


def test_the_first_log_line_says_emulator_and_requests_are_not_logged(one: Service) -> None:
    one.post("/v1/completions", ask("/v1/completions", 2))
    lines = [line for line in one.log.read_text().splitlines() if "INFO" in line]
    assert "EMULATOR" in lines[0]
    assert "ready: aggregated worker" in lines[1]
    assert len(lines) == 2


@pytest.mark.parametrize("path", ROUTES)
def test_streamed_and_whole_answers_agree(one: Service, path: str) -> None:
    before = one.metrics()
    whole = one.json(path, ask(path, 7))
    chunks = events(one.post(path, ask(path, 7, stream=True, stream_options={"include_usage": True}))[1])
    if path == "/generate":
        assert len(chunks) == 7
        assert chunks[-1]["text"] == whole["text"]
        assert whole["meta_info"]["prompt_tokens"] == 6
        assert whole["meta_info"]["e2e_latency"] > 0
    else:
        assert chunks[-1]["choices"] == []
        usage = {"prompt_tokens": 6, "completion_tokens": 7, "total_tokens": 13}
        for answer in (whole, chunks[-1]):
            assert {key: answer["usage"][key] for key in usage} == usage
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        part = "delta" if "chat" in path else "text"
        parts = [chunk["choices"][0][part] for chunk in chunks[:-1]]
        texts = [piece.get("content", "") if isinstance(piece, dict) else piece for piece in parts]
        assert "".join(texts) == text_of(path, whole)
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-3:-1]] == [None, "length"]
    assert len(text_of(path, whole).split()) == 7
    after = one.metrics()
    moved = {name: after[name] - before.get(name, 0) for name in after}
    assert moved["num_requests_total"] == 2
    assert moved["prompt_tokens_total"] == 12
    assert moved["generation_tokens_total"] == 14
    assert moved["time_to_first_token_seconds_count"] == 2
    assert moved["e2e_request_latency_seconds_count"] == 2
    assert moved["inter_token_latency_seconds_count"] == 12
    assert "num_aborted_requests_total" not in moved or moved["num_aborted_requests_total"] == 0


def test_all_routes_and_prompt_forms_say_the_same(one: Service) -> None:
    texts = {text_of(path, one.json(path, ask(path, 5))) for path in ROUTES}
    assert len(texts) == 1
    assert text_of("/generate", one.json("/generate", {**ask("/generate", 5), "text": PROMPT + "!"})) not in texts


def test_lists_of_prompts(one: Service) -> None:
    alone = [one.json("/v1/completions", {"prompt": [n, 2, 3], "max_tokens": 4})["choices"][0]["text"] for n in (1, 9)]
    body = {"prompt": [[1, 2, 3], [9, 2, 3]], "max_tokens": 4}
    both = one.json("/v1/completions", body)
    assert [choice["text"] for choice in both["choices"]] == alone
    assert both["usage"]["completion_tokens"] == 8
    chunks = events(one.post("/v1/completions", {**body, "stream": True})[1])
    for place in (0, 1):
        mine = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"][0]["index"] == place]
        assert "".join(mine) == alone[place]
    listed = one.json("/generate", {"input_ids": body["prompt"], "sampling_params": {"max_new_tokens": 4}})
    assert [part["text"] for part in listed] == alone


@pytest.mark.parametrize("path", ROUTES)
def test_bad_bodies_are_a_400_with_a_message(one: Service, path: str) -> None:
    for body in (b"{", b"[]", {}, {**ask(path, 1), "n": 3}, {**ask(path, 40_000)}):
        status, data = one.post(path, body)
        assert status == 400, data
        answer = json.loads(data)
        assert (answer["error"] if path == "/generate" else answer)["message"]


def test_continuous_usage_counts_every_token(one: Service) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = ask("/v1/completions", 5, stream=True, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in events(one.post("/v1/completions", body)[1])]
    assert counts == [1, 2, 3, 4, 5, 5]


def open_stream(one: Service, body: dict[str, Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(one.url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json", "Connection": "close"})
    return connection, connection.getresponse()


def test_tokens_keep_an_absolute_schedule(tmp_path: Path) -> None:
    """A drift would add up over the tokens: the median lateness at the end is compared with that at the beginning."""
    constant = {"decode_overhead_ms": 10, "decode_us_per_request": 0, "bandwidth_gb_per_s": 1e12, "tflops": 1e9}
    with worker("aggregated", profile_file(tmp_path, **constant)) as made:
        connection, response = open_stream(made, ask("/v1/completions", 200, stream=True))
        with contextlib.closing(connection):
            stamps = []
            while (line := response.readline()) and b"[DONE]" not in line:
                if line.startswith(b"data: "):
                    stamps.append(time.monotonic())
    late = [stamp - stamps[0] - index * 0.010 for index, stamp in enumerate(stamps)]
    assert len(late) == 200
    # the fastest of a group shows the schedule, the others show the machine's load
    assert abs(min(late[-50:]) - min(late[1:51])) < 0.010


def test_each_token_is_an_event_of_its_own_write(one: Service) -> None:
    connection, response = open_stream(one, ask("/v1/completions", 5, stream=True))
    with contextlib.closing(connection):
        raw = response.fp.read()
    sizes = re.findall(rb"(?:^|\r\n)([0-9a-f]+)\r\ndata: ", raw)
    assert len(sizes) == 6  # HTTP chunks: five tokens and [DONE]


def test_a_client_that_leaves_stops_its_generation(one: Service) -> None:
    before = one.metrics()
    connection, response = open_stream(one, ask("/v1/completions", 20_000, stream=True))
    for _ in range(3):
        assert response.readline()
    assert one.json("/v1/loads")["loads"][0]["num_running_reqs"] == 1
    assert one.get("/flush_cache")[0] == 400
    response.close()
    connection.close()
    wait_for(lambda: one.metrics()["num_running_reqs"] == 0, "stopped", 10)
    after = one.metrics()
    assert after["num_aborted_requests_total"] - before.get("num_aborted_requests_total", 0) == 1
    assert 0 < after["generation_tokens_total"] - before.get("generation_tokens_total", 0) < 20_000
    assert after["num_queue_reqs"] == 0
    assert one.json("/get_load")[0]["num_reqs"] == 0


def test_a_client_that_leaves_a_whole_answer_stops_it_too(one: Service) -> None:
    before = one.metrics().get("num_aborted_requests_total", 0)
    connection = http.client.HTTPConnection(one.url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/generate", json.dumps(ask("/generate", 20_000)), {"Content-Type": "application/json"})
    wait_for(lambda: one.metrics()["num_running_reqs"] == 1, "running")
    connection.close()
    wait_for(lambda: one.metrics()["num_running_reqs"] == 0, "stopped", 10)
    assert one.metrics()["num_aborted_requests_total"] == before + 1


def test_one_connection_takes_streams_and_whole_answers_in_turn(one: Service) -> None:
    """The real server runs on uvloop: streams and whole answers in turn on one connection keep their order and end."""
    connection = http.client.HTTPConnection(one.url.removeprefix("http://"), timeout=60)
    with contextlib.closing(connection):
        for turn in range(4):
            for path in ROUTES:
                body = ask(path, 3 + turn, stream=turn % 2 == 0)
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
                data = connection.getresponse().read()
                assert data.endswith(b"data: [DONE]\n\n" if turn % 2 == 0 else b"}")
                assert not turn % 2 or len(text_of(path, json.loads(data)).split()) == 3 + turn


def test_flush_cache(one: Service) -> None:
    one.wait_until_idle()
    assert one.get("/flush_cache")[0] == 200
    assert one.post("/flush_cache?timeout=5", b"")[0] == 200
    assert one.get("/flush_cache?timeout=soon")[0] == 422


def test_full_slots_make_a_queue(tmp_path: Path) -> None:
    with worker("aggregated", profile_file(tmp_path, decode_overhead_ms=20), "--max-running-requests", "1") as made:
        with ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(made.json, "/generate", ask("/generate", 25)) for _ in range(3)]
            wait_for(lambda: made.metrics()["num_queue_reqs"] == 2, "two in the queue")
            assert made.metrics()["num_running_reqs"] == 1
            latencies = sorted(answer.result()["meta_info"]["e2e_latency"] for answer in answers)
        assert latencies[2] > 2.5 * latencies[0]


def test_prefill_is_first_come_first_served(tmp_path: Path) -> None:
    """Five prompts of one pass of 100 ms each, sent together: the last waits for all, whatever the machine does to the rest."""
    with worker("aggregated", profile_file(tmp_path, chunked_prefill_tokens=100, prefill_overhead_ms=100)) as made:
        with ThreadPoolExecutor(5) as pool:
            prompts = [list(range(100 * n, 100 * n + 100)) for n in range(5)]  # different: nothing is cached
            bodies = [{"input_ids": prompt, "sampling_params": {"max_new_tokens": 1}} for prompt in prompts]
            answers = [pool.submit(made.json, "/generate", body) for body in bodies]
            latencies = sorted(answer.result()["meta_info"]["e2e_latency"] for answer in answers)
        assert latencies[-1] > 0.4
        assert latencies[-1] > 2 * latencies[0]
