"""Emulated workers behind the real sglang-router."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from emulated_workers import Service, events, profile_file, router, wait_for, worker

PROMPT = "the quick brown fox jumps"
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"text": PROMPT, "sampling_params": {"max_new_tokens": 6, "ignore_eos": True}},
    "/v1/completions": {"model": "m", "prompt": PROMPT, "max_tokens": 6, "ignore_eos": True},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6},
}
OPTIONS = ("--model-path", "m")


def text_of(path: str, data: bytes, stream: bool) -> str:
    if not stream:
        answer = json.loads(data)
        if path == "/generate":
            return str(answer["text"])
        return str(answer["choices"][0]["message"]["content"] if "chat" in path else answer["choices"][0]["text"])
    chunks = events(data)
    if path == "/generate":
        return str(chunks[-1]["text"])
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    return "".join(choice["delta"].get("content") or "" if "chat" in path else choice["text"] for choice in choices)


def pd_options(prefills: list[Service], decodes: list[Service]) -> list[str]:
    options = ["--pd-disaggregation"]
    for prefill in prefills:
        options += ["--prefill", prefill.url, str(prefill.bootstrap_port)]
    for decode in decodes:
        options += ["--decode", decode.url]
    return options


def wait_for_workers(front: Service, count: int) -> None:
    wait_for(lambda: len(front.json("/workers")["workers"]) == count, f"with {count} workers")


@pytest.fixture(scope="module")
def aggregated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with worker("aggregated", profile_file(tmp_path_factory.mktemp("agg")), *OPTIONS) as made:
        yield made


def test_two_prefill_one_decode(tmp_path: Path, aggregated: Service) -> None:
    quick = profile_file(tmp_path, bootstrap_attempts=3)
    with (
        worker("prefill", quick, *OPTIONS) as first,
        worker("prefill", quick, *OPTIONS) as second,
        worker("decode", quick, *OPTIONS) as decode,
        router(*pd_options([first, second], [decode])) as front,
    ):
        wait_for_workers(front, 3)
        sent = 0
        for path, body in BODIES.items():
            for stream in (False, True):
                for _ in range(2):  # round robin: once over each prefill
                    status, data = front.post(path, {**body, "stream": stream})
                    sent += 1
                    assert status == 200, data
                    alone = aggregated.post(path, {**body, "stream": stream})[1]
                    assert text_of(path, data, stream) == text_of(path, alone, stream)
                    assert len(text_of(path, data, stream).split()) == 6
        for made in (first, second, decode):
            made.wait_until_idle()
        counts = [made.metrics() for made in (first, second, decode)]
        assert [count["num_requests_total"] for count in counts] == [sent / 2, sent / 2, sent]
        assert sum(count["kv_transfer_total_mb_count"] for count in counts[:2]) == sent
        assert counts[2]["generation_tokens_total"] == 6 * sent

        # a killed prefill: what comes later is answered by the other one
        served = second.metrics()["num_requests_total"]
        first.process.kill()
        first.process.wait()
        for path, body in BODIES.items():
            for stream in (False, True):
                status, data = front.post(path, {**body, "stream": stream})
                assert status == 200, data
                assert len(text_of(path, data, stream).split()) == 6
        assert second.metrics()["num_requests_total"] >= served + 6


def test_a_batch_of_prompts(tmp_path: Path, aggregated: Service) -> None:
    quick = profile_file(tmp_path)
    body = {"model": "m", "prompt": ["a b c", "d e"], "max_tokens": 4}
    with (
        worker("prefill", quick, *OPTIONS) as prefill,
        worker("decode", quick, *OPTIONS) as decode,
        router(*pd_options([prefill], [decode])) as front,
    ):
        wait_for_workers(front, 2)
        texts = [choice["text"] for choice in front.json("/v1/completions", body)["choices"]]
        assert texts == [choice["text"] for choice in aggregated.json("/v1/completions", body)["choices"]]


def test_aggregated_workers(tmp_path: Path, aggregated: Service) -> None:
    with (
        worker("aggregated", profile_file(tmp_path), *OPTIONS) as other,
        router("--worker-urls", aggregated.url, other.url) as front,
    ):
        wait_for_workers(front, 2)
        before = [made.metrics().get("num_requests_total", 0) for made in (aggregated, other)]
        for path, body in BODIES.items():
            for stream in (False, True):
                status, data = front.post(path, {**body, "stream": stream})
                assert status == 200, data
                assert len(text_of(path, data, stream).split()) == 6
        after = [made.metrics()["num_requests_total"] for made in (aggregated, other)]
        assert [new - old for old, new in zip(before, after, strict=True)] == [3, 3]


def test_the_key_passes_from_router_to_workers(tmp_path: Path) -> None:
    secret, quick = tmp_path / "key", profile_file(tmp_path)
    secret.write_text("k3y")
    secret.chmod(0o600)
    options = (*OPTIONS, "--api-key-file", str(secret))
    with (
        worker("prefill", quick, *options) as prefill,
        worker("decode", quick, *options) as decode,
        router(*pd_options([prefill], [decode]), "--api-key", "k3y") as front,
    ):
        wait_for(lambda: len(json.loads(front.get("/workers", "k3y")[1])["workers"]) == 2, "with 2 workers")
        assert front.post("/v1/completions", BODIES["/v1/completions"], "k3y")[0] == 200
        assert front.post("/v1/completions", BODIES["/v1/completions"])[0] == 401


def test_no_prefill_left_is_an_error_not_a_hang(tmp_path: Path) -> None:
    quick = profile_file(tmp_path, bootstrap_attempts=3)
    with (
        worker("prefill", quick, *OPTIONS) as prefill,
        worker("decode", quick, *OPTIONS) as decode,
        router(*pd_options([prefill], [decode])) as front,
    ):
        wait_for_workers(front, 2)
        assert front.post("/generate", BODIES["/generate"])[0] == 200
        prefill.process.kill()
        prefill.process.wait()
        assert front.post("/generate", BODIES["/generate"])[0] >= 500
        decode.wait_until_idle()
        assert decode.metrics()["generation_tokens_total"] == 6
