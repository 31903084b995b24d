"""Every check of the gate fails for its own reason, and only it, on a run that was spoilt in one place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from unit.runfolder import Run, good

from pdbench.cli import main
from pdbench.gate import POINT_CHECKS, RUN_CHECKS, judge
from pdbench.gate.check import Check
from pdbench.gate.rundata import load
from pdbench.records import NOT_REPORTED
from pdbench.run.summary import Bounds

ROOT = Path(__file__).parents[2]


def verdicts(run: Run, folder: Path, **options: object) -> list[Check]:
    return judge(load(run.write(folder), **options))  # type: ignore[arg-type]


def failures(checks: list[Check]) -> dict[str, str]:
    return {check.id: check.message for check in checks if not check.ok}


@pytest.mark.parametrize("ratio", ["3p1d", "1p1d", "agg", "4agg"])
@pytest.mark.parametrize("rates", [(), (4.0,)])
def test_a_good_run_passes_every_check(ratio: str, rates: tuple[float, ...], tmp_path: Path) -> None:
    run = good(ratio, concurrency=(4, 8), rates=rates)
    checks = verdicts(run, tmp_path)
    assert failures(checks) == {}
    assert len(checks) == len(RUN_CHECKS) + len(POINT_CHECKS) * len(run.asked)


# -- one spoilt place each: id of the check, what it must say, how the run is spoilt


def lose_a_record(run: Run) -> None:
    run.records.remove(run.measured()[7])
    run.asked[0]["num_requests"] = 24


def repeat_a_record(run: Run) -> None:
    run.measured()[3].index = 4


def fail_a_request(run: Run) -> None:
    record = run.measured()[5]
    record.ok, record.status, record.error = False, 500, "HTTP 500: Decode transfer failed"
    record.first_s = record.end_s = math.nan
    record.chunk_s, record.chunk_tokens = [], []


def stop_early(run: Run) -> None:
    run.measured()[2].output_tokens = 5


def report_no_tokens(run: Run) -> None:
    run.measured()[2].output_tokens, run.measured()[2].chunk_tokens = NOT_REPORTED, []


def send_another_prompt(run: Run) -> None:
    run.measured()[2].prompt_tokens_asked = 65


def succeed_with_nothing(run: Run) -> None:
    """The false success of benchmarks of broken transfers: HTTP 200, no token, "ok"."""
    record = run.measured()[1]
    record.output_tokens = record.output_tokens_asked = 0
    record.chunk_s, record.chunk_tokens = [], []


def first_token_at_once(run: Run) -> None:
    record = run.measured()[1]
    record.first_s = record.sent_s
    record.chunk_s[0] = record.first_s


def tokens_out_of_order(run: Run) -> None:
    chunks = run.measured()[1].chunk_s
    chunks[2], chunks[3] = chunks[3], chunks[2]


def sent_too_early(run: Run) -> None:
    record = run.measured()[1]
    record.scheduled_s = record.sent_s + 0.002


def end_too_early(run: Run) -> None:
    run.measured()[1].end_s = run.measured()[1].chunk_s[-2]


def forget_a_time(run: Run) -> None:
    run.measured()[1].scheduled_s = math.nan


def hit_the_cache(run: Run) -> None:
    run.measured()[1].cached_tokens = 63


def lose_a_worker_at_the_router(run: Run) -> None:
    run.side("after")["router"]["workers"].pop()


def strange_worker_at_the_router(run: Run) -> None:
    run.side("before")["router"]["workers"][0]["url"] = "http://127.0.0.1:39999"


def wrong_role_at_the_router(run: Run) -> None:
    run.side("before")["router"]["workers"][-1]["worker_type"] = "decode"


def sick_worker_at_the_router(run: Run) -> None:
    run.side("after")["router"]["workers"][1]["is_healthy"] = False


def router_silent(run: Run) -> None:
    run.side("after")["router"] = {"workers": [], "readiness": {}, "error": "connection refused"}


def idle_worker(run: Run) -> None:
    """prefill-1 got nothing; prefill-0 did its work."""
    counters, busy = run.metrics("prefill-1"), run.metrics("prefill-0")
    for name, value in counters.items():
        before = run.metrics("prefill-1", "before").get(name, 0.0)
        busy[name] += value - before
        counters[name] = before


def transfer_fails(run: Run) -> None:
    run.metrics("decode-0")['sglang:num_transfer_failed_reqs_total{engine_type="decode",tp_rank="0"}'] = 1.0


def bootstrap_fails(run: Run) -> None:
    run.metrics("prefill-2")['sglang:num_bootstrap_failed_reqs_total{tp_rank="0"}'] = 3.0


def nothing_transferred(run: Run) -> None:
    """Decode recomputes the prompts: every answer is right and nothing was disaggregated."""
    for name in ("prefill-0", "prefill-1", "prefill-2"):
        for end in ("before", "after"):
            metrics = run.metrics(name, end)
            for counter in [key for key in metrics if "kv_transfer" in key]:
                del metrics[counter]


def one_transfer_missing(run: Run) -> None:
    for name in ("prefill-0", "prefill-1", "prefill-2"):
        metrics = run.metrics(name)
        for counter in [key for key in metrics if "kv_transfer_total_mb_count" in key]:
            metrics[counter] -= name == "prefill-0"


def empty_transfers(run: Run) -> None:
    for name in ("prefill-0", "prefill-1", "prefill-2"):
        metrics = run.metrics(name)
        metrics.update({key: 0.0 for key in metrics if "kv_transfer_total_mb_sum" in key})


def answers_from_elsewhere(run: Run) -> None:
    for key in run.metrics("decode-0"):
        if "generation_tokens_total" in key:
            run.metrics("decode-0")[key] = 100.0


def counter_falls(run: Run) -> None:
    """decode-0 had served 400 requests before; the process that now counts 28 is another one."""
    for key in run.metrics("decode-0", "before") | run.metrics("decode-0"):
        if "e2e_request_latency_seconds_count" in key:
            run.metrics("decode-0", "before")[key] = 400.0


def started_again(run: Run) -> None:
    run.side("after")["workers"]["prefill-0"]["server_info"]["startup_time"] = {"load_weight": 3.9}


def interrupted(run: Run) -> None:
    run.progress |= {"state": "stopped", "point": 1, "done": 12, "message": "SIGTERM"}


def point_missing(run: Run) -> None:
    run.progress["points"] = 2


def lagging_loop(run: Run) -> None:
    run.clients[0]["loop_lag_ms"]["p99"] = 150.0


def unknown_loop(run: Run) -> None:
    run.clients[0]["loop_lag_ms"] = {"p50": None, "p99": None, "max": None}


def sent_late(run: Run) -> None:
    for record in run.measured():
        record.scheduled_s -= 0.15


def load_not_made(run: Run) -> None:
    run.clients[0]["delivered_load"] = 0.8


def load_unknown(run: Run) -> None:
    run.clients[0]["delivered_load"] = None


SPOILT = [
    ("requests-accounted", "no record of 1 of 24 (index 7)", lose_a_record),
    ("requests-accounted", "more than one record of index 4", repeat_a_record),
    ("error-rate", "1 of 24 requests failed (4.17%; allowed: 0.00%): 1 x HTTP 500: Decode transfer failed", fail_a_request),
    ("output-tokens", "request 2: 5 of 6", stop_early),
    ("output-tokens", "reported no token count for 1 answers", report_no_tokens),
    ("prompt-tokens", "request 2: 64 for 65", send_another_prompt),
    ("no-empty-success", "1 requests count as successes without output (index 1)", succeed_with_nothing),
    ("timing", "request 1: TTFT is 0.000 ms", first_token_at_once),
    ("timing", "request 1: tokens out of order", tokens_out_of_order),
    ("timing", "request 1: sent before it was due", sent_too_early),
    ("timing", "request 1: tokens outside of its first and last", end_too_early),
    ("timing", "request 1: a success without all of its times", forget_a_time),
    ("prefix-cache", "1 prompts were answered from the prefix cache (63 tokens", hit_the_cache),
    ("ratio", "prefill http://127.0.0.1:30002 was missing at the router after the point", lose_a_worker_at_the_router),
    ("ratio", "http://127.0.0.1:39999 before the point, which is not in the plan", strange_worker_at_the_router),
    ("ratio", "decode http://127.0.0.1:30002 before the point, which is not in the plan", wrong_role_at_the_router),
    ("ratio", "for unhealthy after the point", sick_worker_at_the_router),
    ("ratio", "not read after the point: connection refused", router_silent),
    ("workers-served", "prefill-1 served nothing (sglang:prompt_tokens_total moved by 0)", idle_worker),
    ("engine-counts", "generation_tokens_total of decode-0 moved by 100, the client's answers imply 168", answers_from_elsewhere),
    ("no-restart", "decode-0 restarted during the point (sglang:e2e_request_latency_seconds_count fell from 400", counter_falls),
    ("no-restart", "prefill-0 restarted during the point (startup_time changed", started_again),
    ("kv-failures", "decode-0: sglang:num_transfer_failed_reqs_total moved by 1", transfer_fails),
    ("kv-failures", "prefill-2: sglang:num_bootstrap_failed_reqs_total moved by 3", bootstrap_fails),
    ("kv-transfer", "finished 0 KV transfers for 28 answers (prefill-0 shows none of", nothing_transferred),
    ("kv-transfer", "finished 27 KV transfers for 28 answers", one_transfer_missing),
    ("kv-transfer", "28 KV transfers of 0 bytes", empty_transfers),
    ("complete", "incomplete: stopped at point 1 of 1, request 12 of 24: SIGTERM", interrupted),
    ("complete", "incomplete: 1 of 2 load points have records", point_missing),
    ("client-loop", "event-loop lag of the client: p99 150.0 ms (bound 100 ms): the client did not keep up", lagging_loop),
    ("client-loop", "recorded nothing of it: event-loop lag", unknown_loop),
    ("client-on-time", "sending after a request was due: p99 150.3 ms (bound 100 ms)", sent_late),
    ("client-load", "delivered 80.0% of the configured load (concurrency 4;", load_not_made),
    ("client-load", "did not record which load it delivered", load_unknown),
]  # fmt: skip


@pytest.mark.parametrize(("id", "says", "spoil"), SPOILT, ids=[spoil.__name__ for _, _, spoil in SPOILT])
def test_exactly_the_right_check_fails(id: str, says: str, spoil: Callable[[Run], None], tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    spoil(run)
    found = failures(verdicts(run, tmp_path))
    assert set(found) == {id}
    assert says in found[id]


def test_every_check_is_shown_failing_and_explained(tmp_path: Path) -> None:
    ids = {check.id for check in verdicts(good(), tmp_path)}
    assert ids == {id for id, _, _ in SPOILT} | {"files"}
    page = (ROOT / "docs" / "validity.md").read_text()
    assert [id for id in sorted(ids) if f"`{id}`" not in page] == []


@pytest.mark.parametrize("name", ["plan.json", "requests.parquet", "summary.json", "evidence.json"])
def test_a_missing_file_makes_a_run_invalid(name: str, tmp_path: Path) -> None:
    found = failures(judge(load(good().write(tmp_path, leave_out=[name]))))
    assert found["files"] == f"{name} is missing"


@pytest.mark.parametrize("name", ["plan.json", "requests.parquet", "summary.json", "evidence.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"workers": [{}], "points": 3}'])
def test_a_broken_file_makes_a_run_invalid(name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (good().write(tmp_path) / name).write_text(content)
    assert main(["gate", str(tmp_path)]) == 3
    found = failures(judge(load(tmp_path)))
    if not (name == "summary.json" and content.endswith("3}")):
        assert found["files"].startswith(f"{name} is unreadable: ")
    assert "Traceback" not in capsys.readouterr().err


def test_without_engine_metrics_nothing_about_the_engines_is_believed(tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    for entry in run.side("after")["workers"].values():
        entry["metrics"] = {}
    found = failures(verdicts(run, tmp_path))
    assert set(found) == {"workers-served", "engine-counts", "kv-failures", "kv-transfer"}
    assert all("prefill-0 after the point: it showed no metrics (is --enable-metrics set?)" in why for why in found.values())


def test_the_next_counter_is_taken_and_named_where_the_first_is_missing(tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    for end in ("before", "after"):
        for name in ("prefill-0", "prefill-1", "prefill-2"):
            metrics = run.metrics(name, end)
            for key in [key for key in metrics if "kv_transfer_total_mb" in key]:
                del metrics[key]
    checks = verdicts(run, tmp_path)
    assert failures(checks) == {}
    (found,) = [check for check in checks if check.id == "kv-transfer"]
    assert found.evidence["transfers"]["prefill-0"]["counter"] == "sglang:kv_transfer_latency_ms_count"


def test_a_labelled_fallback_counter_counts_only_its_stage(tmp_path: Path) -> None:
    run = good("1p1d", concurrency=(4,))
    metrics = run.metrics("prefill-0")
    for end in ("before", "after"):
        for key in [key for key in run.metrics("prefill-0", end) if "kv_transfer" in key]:
            del run.metrics("prefill-0", end)[key]
    metrics['sglang:per_stage_req_latency_seconds_count{stage="prefill_forward",tp_rank="0"}'] = 500.0
    metrics['sglang:per_stage_req_latency_seconds_count{stage="prefill_transfer_kv_cache",tp_rank="0"}'] = 27.0
    assert "finished 27 KV transfers for 28 answers" in failures(verdicts(run, tmp_path))["kv-transfer"]


def test_the_counters_of_all_ranks_are_added(tmp_path: Path) -> None:
    run = good("1p1d", concurrency=(4,))
    metrics = run.metrics("decode-0")
    (key,) = [key for key in metrics if "generation_tokens_total" in key]
    half = metrics.pop(key) / 2
    metrics |= {key.replace("{", '{dp_rank="0",'): half, key.replace("{", '{dp_rank="1",'): half}
    assert failures(verdicts(run, tmp_path)) == {}


def test_only_the_point_that_is_bad_is_blamed(tmp_path: Path) -> None:
    run = good(concurrency=(4, 8, 16))
    run.measured(1)[3].output_tokens = 2
    assert [(c.id, c.point) for c in verdicts(run, tmp_path) if not c.ok] == [("output-tokens", 1)]


@pytest.mark.parametrize(
    ("option", "manifest", "valid"), [(None, 0.05, True), (0.05, 0.0, True), (0.0, 0.05, False), (None, 0.04, False)]
)
def test_failed_requests_are_allowed_up_to_the_share(option: float | None, manifest: float, valid: bool, tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    fail_a_request(run)
    run.manifest["bench_max_error_rate"] = manifest
    assert ("error-rate" not in failures(verdicts(run, tmp_path, max_error_rate=option))) is valid


def test_what_the_server_puts_before_every_prompt_is_no_contamination(tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    run.prompt = "text"
    for record in run.measured():
        record.prompt_tokens_asked, record.cached_tokens = record.prompt_tokens - 20, 20  # a chat template of 20 tokens
    assert failures(verdicts(run, tmp_path)) == {}
    run.measured()[3].cached_tokens = 60
    assert set(failures(verdicts(run, tmp_path))) == {"prefix-cache"}


def test_an_unreported_cache_is_said_and_not_blamed(tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    run.measured()[0].cached_tokens = NOT_REPORTED
    (found,) = [check for check in verdicts(run, tmp_path) if check.id == "prefix-cache"]
    assert (found.ok, found.message[:44]) == (True, "cached tokens are not reported for 1 of 24 a")


def test_the_client_is_held_to_the_bounds_that_it_was_started_with(tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    lagging_loop(run)
    run.bounds = Bounds(loop_lag_ms=200.0, lateness_ms=0.1, delivered=0.995)
    assert set(failures(verdicts(run, tmp_path))) == {"client-on-time", "client-load"}
    (tmp_path / "run.json").write_text("{}")
    assert set(failures(judge(load(tmp_path)))) == {"client-loop"}


def test_a_client_whose_own_part_is_large_is_worth_a_word(tmp_path: Path) -> None:
    """40 ms late is within bounds, and much beside a TTFT of 100 ms; beside one of 3 s it is nothing."""
    run = good(concurrency=(4,))
    run.clients[0]["loop_lag_ms"]["p99"] = 40.0
    (found,) = [check for check in verdicts(run, tmp_path) if check.id == "client-loop"]
    assert found.ok
    assert found.evidence["caution"].startswith("event-loop lag of the client is p99 40.0 ms beside a p99 TTFT of 1")
    for record in run.measured():
        record.first_s, record.end_s = record.first_s + 3, record.end_s + 3
        record.chunk_s = [at + 3 for at in record.chunk_s]
    (found,) = [check for check in verdicts(run, tmp_path) if check.id == "client-loop"]
    assert (found.ok, "caution" in found.evidence) == (True, False)


def test_a_run_killed_before_it_measured_is_incomplete(tmp_path: Path) -> None:
    run = good()
    run.progress |= {"state": "running"}
    found = failures(judge(load(run.write(tmp_path, leave_out=["requests.parquet", "summary.json", "evidence.json"]))))
    assert found["complete"].startswith("incomplete: running at point 2 of 2")
    assert found["files"] == "requests.parquet is missing, summary.json is missing, evidence.json is missing"


# -- the command


def test_the_command_writes_the_verdict_and_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = good(emulated=True)
    assert main(["gate", str(run.write(tmp_path))]) == 0
    said = capsys.readouterr().out
    assert said.endswith("note  the engine was emulated: no GPU was used\nVALID\n")
    first = (tmp_path / "validity.json").read_text()
    assert json.loads(first)["valid"] is True
    assert main(["gate", str(tmp_path)]) == 0
    assert (tmp_path / "validity.json").read_text() == first
    assert capsys.readouterr().out == said


def test_the_command_names_the_point_of_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = good()
    run.measured(1)[2].output_tokens = 5
    assert main(["gate", str(run.write(tmp_path))]) == 3
    said = capsys.readouterr().out
    assert "  FAIL  output-tokens" in said
    assert "concurrency 8: 1 answers do not have the length" in said
    assert said.endswith(f"INVALID: 1 of {2 + 2 * len(POINT_CHECKS)} checks failed\n")
    written = json.loads((tmp_path / "validity.json").read_text())
    assert (written["schema"], written["valid"]) == (1, False)
    (bad,) = [check for check in written["checks"] if not check["ok"]]
    assert (bad["id"], bad["point"]) == ("output-tokens", 1)
    assert bad["evidence"]["wrong"] == [{"index": 2, "delivered": 5, "asked": 6}]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ([], 2, "DIR"),
        (["{}", "--max-error-rate", "1.5"], 2, "1.5 is not a share between 0 and 1"),
        (["{}", "--max-error-rate", "nan"], 2, "nan is not a share between 0 and 1"),
        (["{}", "--max-error-rate", "lots"], 2, "lots is not a share between 0 and 1"),
        (["{}/nowhere"], 1, "is not a folder; give the folder of a run"),
        (["{}"], 1, "is not the folder of a run: it has neither progress.json nor requests.parquet"),
    ],
)
def test_bad_usage(args: list[str], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", *(arg.format(tmp_path) for arg in args)]) == code
    assert says in capsys.readouterr().err
