"""`pdbench run` as a user starts it, against a server of known timing and known faults."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from emulated_workers import Service, free_port, service, wait_for

from pdbench.records import MEASURE, WARMUP, Record, read_jsonl, read_parquet

TESTS = Path(__file__).resolve().parents[1]
#: A machine that runs other tests too may be late; what is tested here is not that.
PATIENT = ("--max-loop-lag-ms", "5000", "--max-lateness-ms", "5000", "--min-delivered", "0")


def truth(*options: str) -> Any:
    port = free_port()
    return service([sys.executable, str(TESTS / "truth_server.py"), str(port), *options], f"http://127.0.0.1:{port}", "/ready")


@pytest.fixture(scope="module")
def server() -> Iterator[Service]:
    with truth() as made:
        yield made


def command(url: str, folder: Path, *options: str, model: str = "good", osl: str = "8") -> list[str]:
    argv = [sys.executable, "-m", "pdbench", "run", "--url", url, "--model", model, "--output", str(folder)]
    lengths = [] if "--trace" in options else ["--isl", "16-32", "--osl", osl]
    return [*argv, *lengths, *PATIENT, *options]


def run(url: str, folder: Path, *options: str, **more: str) -> tuple[int, str]:
    done = subprocess.run(command(url, folder, *options, **more), capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def measured(folder: Path) -> list[Record]:
    return [r for r in read_parquet(folder / "requests.parquet") if r.phase == MEASURE]


@pytest.mark.parametrize("api", ["completions", "chat", "generate"])
def test_a_valid_run(server: Service, tmp_path: Path, api: str) -> None:
    code, text = run(server.url, tmp_path / "o", "--api", api, "--concurrency", "2,4", "--num-requests", "12")
    assert code == 0, text
    s = summary(tmp_path / "o")
    assert (s["completed"], s["failed"], s["valid"], s["invalid_reasons"]) == (24, 0, True, [])
    assert [p["concurrency"] for p in s["points"]] == [2, 4]
    assert s["prompt"] == ("text" if api == "chat" else "tokens")
    records = read_parquet(tmp_path / "o" / "requests.parquet")
    assert [sum(r.point == p and r.phase == ph for r in records) for p in (0, 1) for ph in (WARMUP, MEASURE)] == [2, 12, 4, 12]
    for r in records:
        assert r.ok
        assert (len(r.chunk_s), r.chunk_tokens, r.output_tokens, r.prompt_tokens) == (8, [1] * 8, 8, r.prompt_tokens_asked)
        assert r.scheduled_s <= r.sent_s < r.first_s <= r.end_s
        assert r.first_s - r.sent_s >= 0.02
        assert 16 <= r.prompt_tokens_asked <= 32
    for point in (0, 1):
        warm = [r.end_s for r in records if r.point == point and r.phase == WARMUP]
        assert max(warm) <= min(r.sent_s for r in records if r.point == point and r.phase == MEASURE)
    assert json.loads((tmp_path / "o" / "progress.json").read_text())["state"] == "done"
    assert not (tmp_path / "o" / "requests.jsonl").exists()
    assert "c=2" in text
    assert "TTFT ms" in text


def test_the_same_seed_sends_the_same_and_no_prompt_twice(tmp_path: Path) -> None:
    bodies = []
    for seed, name in ((5, "a"), (5, "b"), (6, "c")):
        with truth() as server:
            options = ("--concurrency", "1,1", "--num-requests", "5", "--seed", str(seed))
            assert run(server.url, tmp_path / name, *options)[0] == 0
            bodies.append([entry["body"] for entry in server.json("/seen")["seen"]])
            assert server.json("/seen")["most"] == 1
    assert bodies[0] == bodies[1]
    assert bodies[0] != bodies[2]
    firsts = [body["prompt"][0] for body in bodies[0]]
    assert len(firsts) == len(set(firsts)) == 13  # probe, 2 warm-ups, 10 measured
    lengths = [len(body["prompt"]) for body in bodies[0]]
    assert lengths[2:7] == lengths[8:13]


def test_warm_up_and_load_keep_to_the_concurrency(tmp_path: Path) -> None:
    with truth() as server:
        code, text = run(server.url, tmp_path / "o", "--concurrency", "3", "--num-requests", "12", "--warmup", "9")
        assert code == 0, text
        assert server.json("/seen")["most"] == 3
    assert summary(tmp_path / "o")["client"]["delivered_load"] > 0.5


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("error-event", "error event: out of memory"),
        ("truncated", "truncated: the connection ended before the response did"),
        ("reset", "the connection"),
        ("unavailable", "HTTP 503: no workers"),
        ("wrong", "HTTP 200 with an error: bad room"),
        ("whole", "not streamed"),
        ("hang", "timeout: no complete answer after 0.5 s"),
    ],
)
def test_every_fault_is_counted_and_named(server: Service, tmp_path: Path, model: str, error: str) -> None:
    options = ("--concurrency", "2", "--num-requests", "4", "--warmup", "1", "--timeout", "0.5" if model == "hang" else "20")
    code, text = run(server.url, tmp_path / "o", *options, model=model)
    assert code == 3, text
    s = summary(tmp_path / "o")
    assert (s["completed"], s["failed"], s["valid"], s["ttft_ms"]["p50"]) == (0, 4, False, None)
    assert error in s["invalid_reasons"][0]
    assert error in text
    assert all(not r.ok and error in r.error for r in measured(tmp_path / "o"))
    if model in ("error-event", "truncated"):
        assert all(len(r.chunk_s) == 2 for r in measured(tmp_path / "o"))


def test_failures_stand_beside_successes(server: Service, tmp_path: Path) -> None:
    code, text = run(server.url, tmp_path / "o", "--concurrency", "2", "--num-requests", "20", "--warmup", "0", model="flaky")
    assert code == 3, text
    s = summary(tmp_path / "o")
    assert s["failed"] in (3, 4, 5)
    assert s["completed"] + s["failed"] == 20
    assert s["ttft_ms"]["min"] >= 20


def test_answers_of_the_wrong_length_are_invalid(server: Service, tmp_path: Path) -> None:
    code, _ = run(server.url, tmp_path / "o", "--concurrency", "2", "--num-requests", "4", model="short")
    assert code == 3
    assert "not as long as forced" in summary(tmp_path / "o")["invalid_reasons"][0]


def test_tokens_that_come_in_lumps_are_noted(server: Service, tmp_path: Path) -> None:
    code, text = run(server.url, tmp_path / "o", "--concurrency", "2", "--num-requests", "4", model="lumps", osl="9")
    assert code == 0, text
    s = summary(tmp_path / "o")
    assert s["client"]["tokens_per_event"] == 3.0
    assert "3.0 output tokens" in s["notes"][0]
    assert s["itl_ms"]["p50"] > 2 * s["tpot_ms"]["p50"]


def test_text_where_token_ids_are_refused(server: Service, tmp_path: Path) -> None:
    code, text = run(server.url, tmp_path / "o", "--concurrency", "2", "--num-requests", "4", model="no-ids")
    assert code == 0, text
    assert summary(tmp_path / "o")["prompt"] == "text"
    assert "prompts are text" in text
    code, text = run(
        server.url, tmp_path / "p", "--concurrency", "2", "--num-requests", "4", "--prompt", "tokens", model="no-ids"
    )
    assert code == 1
    assert "HTTP 422" in text


def test_an_open_loop_sends_on_time_while_nothing_is_answered(server: Service, tmp_path: Path) -> None:
    options = ("--request-rate", "50", "--arrival", "constant", "--num-requests", "20", "--warmup", "1")
    code, text = run(server.url, tmp_path / "o", *options, model="slow")
    assert code == 0, text
    records = sorted(measured(tmp_path / "o"), key=lambda r: r.index)
    due = [r.scheduled_s - records[0].scheduled_s for r in records]
    assert due == pytest.approx([i / 50 for i in range(20)], abs=1e-6)
    assert all(r.sent_s >= r.scheduled_s for r in records)
    # The schedule takes 0.4 s, an answer 1.4 s: all were sent before the first was answered.
    assert max(r.sent_s for r in records) < min(r.end_s for r in records)
    s = summary(tmp_path / "o")
    assert (s["request_rate"], s["concurrency"], s["arrival"]) == (50, None, "constant")


def test_a_point_ends_in_time(server: Service, tmp_path: Path) -> None:
    code, text = run(server.url, tmp_path / "o", "--concurrency", "2,4", "--num-requests", "5000", "--max-time", "1.5")
    assert code == 0, text
    s = summary(tmp_path / "o")
    for point in s["points"]:
        assert 2 <= point["num_requests"] == point["completed"] < 5000
        assert point["ended_early"] == "after 1.5 s"
    sent = [r.sent_s for r in measured(tmp_path / "o") if r.point == 0]
    assert max(sent) - min(sent) < 1.6


def test_a_point_ends_when_enough_is_known(server: Service, tmp_path: Path) -> None:
    options = ("--concurrency", "8", "--num-requests", "20000", "--until", "tpot_mean:50%", "--max-time", "40")
    code, text = run(server.url, tmp_path / "o", *options)
    assert code == 0, text
    s = summary(tmp_path / "o")
    assert 100 <= s["num_requests"] == s["completed"] < 20000
    assert s["ended_early"].startswith("known well enough: tpot_mean ± ")


def test_processes_share_one_load(tmp_path: Path) -> None:
    with truth() as server:
        code, text = run(server.url, tmp_path / "o", "--concurrency", "5", "--num-requests", "40", "--processes", "3")
        assert code == 0, text
        assert server.json("/seen")["most"] == 5
    s = summary(tmp_path / "o")
    assert (s["completed"], s["client"]["processes"]) == (40, 3)
    assert sorted(r.index for r in measured(tmp_path / "o")) == list(range(40))
    assert not list((tmp_path / "o").glob(".*"))


def test_conversations_repeat_the_real_answers_turn_by_turn(tmp_path: Path) -> None:
    (tmp_path / "load.yml").write_text(
        "{num_requests: 12, isl: 16, osl: 8, concurrency: 2, warmup: 0, conversation: {turns: 3, think: 0.01}}"
    )
    with truth() as server:
        argv = [sys.executable, "-m", "pdbench", "run", "--url", server.url, "--model", "good", "--output", str(tmp_path / "o")]
        argv += ["--api", "chat", "--load", str(tmp_path / "load.yml"), *PATIENT]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        seen = server.json("/seen")
    assert seen["most"] <= 2
    bodies = [entry["body"]["messages"] for entry in seen["seen"][1:]]
    assert sorted(len(messages) for messages in bodies) == [1] * 4 + [3] * 4 + [5] * 4
    answers = {message["content"] for messages in bodies for message in messages if message["role"] == "assistant"}
    assert len(answers) == 1, "the server gives one answer of 8 tokens, and it is repeated as it came"
    assert len(answers.pop().split()) == 8
    records = measured(tmp_path / "o")
    for conversation in {r.conversation for r in records}:
        first, second, third = sorted((r for r in records if r.conversation == conversation), key=lambda r: r.turn)
        assert (first.turn, second.turn, third.turn) == (1, 2, 3)
        assert second.scheduled_s >= first.end_s + 0.01
        assert third.scheduled_s >= second.end_s + 0.01
    turns = summary(tmp_path / "o")["turns"]
    assert [(turn["turn"], turn["completed"], turn["failed"]) for turn in turns] == [(1, 4, 0), (2, 4, 0), (3, 4, 0)]
    latencies = [turn["cumulative_latency_ms"]["mean"] for turn in turns]
    assert latencies == sorted(latencies)


def test_a_trace_gives_lengths_and_times(server: Service, tmp_path: Path) -> None:
    trace = ("--trace", str(TESTS / "data" / "mooncake_excerpt.jsonl"), "--length-scale", "0.01", "--max-osl", "5")
    code, text = run(server.url, tmp_path / "o", *trace, "--concurrency", "4", "--num-requests", "10")
    assert code == 0, text
    asked = [(r.prompt_tokens_asked, r.output_tokens_asked) for r in measured(tmp_path / "o")]
    assert asked[0] == (68, 5)
    code, text = run(server.url, tmp_path / "p", *trace, "--time-scale", "0.05", "--num-requests", "10")
    assert code == 0, text
    assert [(r.prompt_tokens_asked, r.output_tokens_asked) for r in measured(tmp_path / "p")] == asked
    rows = [json.loads(line) for line in (TESTS / "data" / "mooncake_excerpt.jsonl").read_text().splitlines()[:10]]
    records = measured(tmp_path / "p")
    due = [r.scheduled_s - records[0].scheduled_s for r in records]
    assert due == pytest.approx([row["timestamp"] / 1000 * 0.05 for row in rows], abs=1e-6)


def test_the_key_is_sent_and_never_written(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sesame-123\n")
    with truth("aggregated", "sesame-123") as server:
        options = ("--concurrency", "2", "--num-requests", "4")
        code, text = run(server.url, tmp_path / "no", *options)
        assert code == 1
        assert "HTTP 401: who are you? (--api-key-file?)" in text
        code, text = run(server.url, tmp_path / "o", *options, "--api-key-file", str(tmp_path / "key"))
    assert code == 0, text
    assert "sesame-123" not in text
    assert all(b"sesame-123" not in path.read_bytes() for path in (tmp_path / "o").iterdir())


def test_evidence_and_server_metrics(server: Service, tmp_path: Path) -> None:
    with truth() as other:
        dead = f"http://127.0.0.1:{free_port()}"
        urls = {"prefill-0": server.url, "decode-0": other.url, "decode-1": dead}
        workers = [{"name": n, "url": u, "ranks": [{"host": "h", "gpus": [i]}]} for i, (n, u) in enumerate(urls.items())]
        plan = {"ratio": "1p2d", "workers": workers, "router": {"url": server.url}}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        options = ("--concurrency", "1,2", "--num-requests", "4", "--plan", str(tmp_path / "plan.json"))
        code, text = run(server.url, tmp_path / "o", *options, "--scrape-interval", "0.05")
    assert code == 0, text
    s = summary(tmp_path / "o")
    assert (s["ratio"], s["gpus"]) == ("1p2d", 3)
    assert s["points"][0]["output_throughput_per_gpu"] == pytest.approx(s["points"][0]["output_throughput"] / 3)
    evidence = json.loads((tmp_path / "o" / "evidence.json").read_text())
    assert [p["point"] for p in evidence["points"]] == [0, 1]
    before, begin, after = (evidence["points"][0][side] for side in ("before", "begin", "after"))
    assert begin["workers"]["prefill-0"]["metrics"]["sglang:num_requests_total"] == (
        before["workers"]["prefill-0"]["metrics"]["sglang:num_requests_total"] + 1
    )
    counter = "sglang:num_requests_total"
    served = after["workers"]["prefill-0"]["metrics"][counter] - before["workers"]["prefill-0"]["metrics"][counter]
    assert served == 5  # one warm-up, four measured
    assert after["workers"]["decode-0"]["metrics"][counter] == 0
    info = after["workers"]["decode-0"]["server_info"]
    assert info["version"] == "0.5.23"
    assert "secret" not in info
    assert after["workers"]["decode-1"]["error"]
    assert after["router"]["error"].count("HTTP 404") == 2  # this server is no router
    rows = pq.read_table(tmp_path / "o" / "server_metrics.parquet").to_pylist()
    servers = [row for row in rows if not row["source"].startswith("host:")]
    assert {row["source"] for row in servers} == {"prefill-0", "decode-0"}
    assert {row["name"] for row in servers} == {counter}
    assert {row["point"] for row in rows} == {0, 1}


def start(server: Service, folder: Path, **limits: Any) -> subprocess.Popen[str]:
    argv = command(server.url, folder, "--concurrency", "2,2", "--num-requests", "400", "--warmup", "1")
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **limits)


def journalled(folder: Path, count: int) -> bool:
    path = folder / "requests.jsonl"
    return path.exists() and path.read_text().count("\n") >= count


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_keeps_what_it_has(server: Service, tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "o"
    process = start(server, folder)
    try:
        wait_for(lambda: journalled(folder, 10), "measuring")
        os.killpg(process.pid, number)  # as a terminal's Ctrl-C does, to the whole group
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 3, err
    assert "Traceback" not in err
    s = summary(folder)
    assert s["invalid_reasons"][0].startswith("stopped: 1 of 2 load points")
    records = measured(folder)
    assert 9 <= s["completed"] < 400
    assert s["completed"] + s["failed"] == len(records)
    assert 1 <= sum(r.error.startswith("stopped") for r in records) <= 2
    assert json.loads((folder / "progress.json").read_text())["state"] == "stopped"
    assert "c=2" in out


def test_a_killed_run_is_recovered(server: Service, tmp_path: Path) -> None:
    folder = tmp_path / "o"
    process = start(server, folder)
    try:
        wait_for(lambda: journalled(folder, 10), "measuring")
    finally:
        process.kill()  # the sender alone: its helper must go by itself
        process.communicate(timeout=30)
    kept = len(list(read_jsonl(folder / "requests.jsonl")))
    argv = [sys.executable, "-m", "pdbench", "run", "--recover", str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    s = summary(folder)
    assert s["completed"] + 1 >= kept  # one warm-up
    assert s["invalid_reasons"][0].startswith("recovered")
    assert s["client"]["loop_lag_ms"]["p99"] is None
    assert subprocess.run(argv, capture_output=True, timeout=60).returncode == 2
    assert not helpers_of(process.pid)


def helpers_of(group: int) -> list[str]:
    """Processes that are still in the session of a run; given a moment to leave."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        listed = subprocess.run(["ps", "-o", "args=", "-s", str(group)], capture_output=True, text=True).stdout.split("\n")
        found = [line for line in listed if line and "defunct" not in line]
        if not found:
            return []
        time.sleep(0.1)
    return found


def test_a_full_disk_is_one_message(server: Service, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk's end: both are an OSError in the middle of a write."""
    folder = tmp_path / "o"
    process = start(server, folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)))
    try:
        _, err = process.communicate(timeout=50)
    finally:
        process.kill()
    assert process.returncode == 1, err
    assert f"cannot write in {folder}: File too large" in err
    assert "--recover" in err
    assert "Traceback" not in err
    assert not (folder / "summary.json").exists()


def test_a_folder_that_cannot_be_written_is_one_message(server: Service, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, text = run(server.url, tmp_path / "file" / "o", "--concurrency", "1", "--num-requests", "1")
    assert code == 1
    assert "cannot write in" in text
