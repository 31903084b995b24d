"""Every check of the gate fails for its own reason, and only it, on a run that was spoilt in one place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from unit.gate_faults import KV_CHECKS, LIVE, SPOILT, calibrate, expect, fail_a_request, lagging_loop, tell_kv_bytes, verify
from unit.runfolder import KV_BYTES, Run, good

from pdbench.cli import main
from pdbench.gate import POINT_CHECKS, RUN_CHECKS, judge
from pdbench.gate.check import Check
from pdbench.gate.rundata import load
from pdbench.gate.transport import allowed
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


@pytest.mark.parametrize(("ids", "says", "spoil"), SPOILT, ids=[spoil.__name__ for _, _, spoil in SPOILT])
def test_exactly_the_right_checks_fail(ids: tuple[str, ...], says: str, spoil: Callable[[Run], None], tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    spoil(run)
    found = failures(verdicts(run, tmp_path))
    assert set(found) == set(ids)
    assert says in found[ids[0]]


def test_every_check_is_shown_failing(tmp_path: Path) -> None:
    shown = {id for ids, _, _ in SPOILT for id in ids} | {id for fault in LIVE for id in fault.checks}
    assert {check.id for check in verdicts(good(), tmp_path)} == shown


def test_the_page_says_what_the_tests_show() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "docs_validity.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_client_that_was_calibrated_or_not(tmp_path: Path) -> None:
    def verdict(run: Run, name: str) -> Check:
        found = [check for check in verdicts(run, tmp_path / name) if check.id == "client-calibrated"]
        return found[-1]

    # not asked for: never a silent pass
    assert verdict(good(), "off").ok
    assert verdict(good(), "off").evidence["caution"] == verdict(good(), "off2").message
    run = good(concurrency=(4, 8))
    calibrate(run)
    assert verdict(run, "on").message.startswith(
        "grade A: with 8 requests in flight the client's TTFT is wrong by 0.8 ms (p99 6.0)"
    )
    assert "caution" not in verdict(run, "on2").evidence
    # right to a tenth, but not by much; and more tokens than it was found good for
    calibrate(run, ttft_wrong_by={"mean": 7.5, "p99": 20.0}, most_tokens_per_s=100.0)
    found = verdict(run, "near")
    assert found.ok
    assert "the client's own part in the mean TTFT" in found.evidence["caution"]
    assert "was found good for about 100" in found.evidence["caution"]
    # the point's own load counts: the nearest that is not lighter
    heavy = dict(run.selfcheck["points"][0], concurrency=64, reasons=["too slow at 64"], grade="F")
    run.selfcheck["points"].append(heavy)
    assert verdict(run, "lighter").ok
    run.selfcheck["points"][0]["concurrency"] = 4
    assert "too slow at 64" in verdict(run, "heavier").message
    run.selfcheck["points"] = [{"concurrency": 8}]
    assert "not as `pdbench selfcheck` writes it" in verdict(run, "odd").message


def test_a_kv_cache_that_was_verified(tmp_path: Path) -> None:
    def verdict(run: Run, name: str) -> Check:
        (found,) = [check for check in verdicts(run, tmp_path / name) if check.id == "kv-correct"]
        return found

    assert verdict(good(), "off").message == "not checked (bench_verify_outputs is 0)"
    run = good()
    verify(run)
    assert verdict(run, "on").ok
    assert verdict(run, "on").message.startswith(
        "2 prompts over each of 3 pairs: the answers are the prefill workers' own, within 0.01"
    )
    # an engine whose prefill workers cannot be asked: said, and no failure
    run.evidence["verify"] = {"prompts": 2, "reason": "this engine has no such request", "pairs": []}
    found = verdict(run, "unable")
    assert found.ok
    assert found.evidence["caution"] == "whether the KV cache arrives right was not checked: this engine has no such request"


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
    assert set(found) == {"workers-served", "engine-counts", *KV_CHECKS}
    assert all("-0 after the point: it showed no metrics (is --enable-metrics set?)" in why for why in found.values())


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
    (found,) = [check for check in checks if check.id == "kv-bytes"]
    assert found.evidence["caution"].startswith("the size of the KV transfers is not known: prefill-0 shows none of")


def test_whole_pages_move(tmp_path: Path) -> None:
    """Prompts of 64 tokens fill 3 pages of 24 tokens: 72 tokens' worth of bytes."""
    run = good(concurrency=(4,))
    tell_kv_bytes(run)
    for end in ("before", "after"):
        for name in ("prefill-0", "prefill-1", "prefill-2"):
            run.side(end)["workers"][name]["server_info"]["page_size"] = 24
            metrics = run.metrics(name, end)
            metrics.update({key: value * 72 / 64 for key, value in metrics.items() if "total_mb_sum" in key})
    assert failures(verdicts(run, tmp_path)) == {}


def test_transfers_beyond_the_answers_may_move_more(tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    tell_kv_bytes(run)
    metrics = run.metrics("prefill-0")
    for key in [key for key in metrics if "kv_transfer_total_mb" in key]:
        metrics[key] += 2 if key.startswith("sglang:kv_transfer_total_mb_count") else 2 * 64 * KV_BYTES / 2**20
    assert failures(verdicts(run, tmp_path)) == {}
    for key in [key for key in metrics if "kv_transfer_total_mb_sum" in key]:
        metrics[key] += 1
    assert set(failures(verdicts(run, tmp_path))) == {"kv-bytes"}


def test_how_the_kv_cache_moved_is_said_where_it_can_be_seen(tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    expect(run, "rdma")
    run.logs["gh200-pd-prefill-0.log"] = "Using RDMA transport (RoCE/iWARP)"
    run.metrics("decode-0")['pdbench_emulator_kv_transfers_total{peer="127.0.0.1:31001",transport="rdma"}'] = 9.0
    run.side("after")["workers"]["decode-0"]["server_info"]["emulated_transport"] = {"127.0.0.1:31002": "rdma"}
    (found,) = [check for check in verdicts(run, tmp_path) if check.id == "transport"]
    assert (found.ok, found.message) == (True, "all 3 pairs moved their KV cache as expected")
    assert [list(row["seen"]) for row in found.evidence["pairs"].values()] == [
        ["log of prefill-0"], ["pdbench_emulator_kv_transfers_total"], ["emulated_transport"],
    ]  # fmt: skip
    del run.logs["gh200-pd-prefill-0.log"]
    (found,) = [check for check in verdicts(run, tmp_path / "unseen") if check.id == "transport"]
    assert found.ok
    assert found.evidence["caution"].startswith("how the KV cache moved was not seen for prefill-0 to decode-0 (the engine")


@pytest.mark.parametrize(
    ("setting", "ways"),
    [
        ("tcp,self", {"tcp"}),
        ("tcp,cuda_copy,cuda_ipc,rc_x", {"tcp", "cuda_ipc", "rdma"}),
        ("all", set()),
        ("^tcp", set()),
        ("tcp,novel", set()),
        (None, set()),
    ],
)
def test_what_ucx_tls_leaves_possible(setting: str | None, ways: set[str]) -> None:
    assert allowed(setting) == ways


def vllm(run: Run) -> None:
    """Turn the run into one of vLLM workers: it counts under other names, and the KV transfers on the decode side."""
    run.plan["engine"] = "vllm"
    for point in run.evidence["points"]:
        point["reset"] = {name: {} for name in point["reset"]}
        for end in ("before", "after"):
            moved: dict[str, float] = {}
            for name, entry in sorted(point[end]["workers"].items(), reverse=True):
                old = {key.split("{")[0].removeprefix("sglang:"): value for key, value in entry["metrics"].items()}
                prompt, count = old.get("prompt_tokens_total", 0), old.get("num_requests_total", 0)
                source = "external_kv_transfer" if name == "decode-0" else "local_compute"
                entry["metrics"] = {
                    'vllm:prompt_tokens_total{engine="0"}': prompt,
                    'vllm:generation_tokens_total{engine="0"}': old.get("generation_tokens_total", 0),
                    'vllm:request_success_total{finished_reason="length"}': count,
                    f'vllm:prompt_tokens_by_source_total{{engine="0",source="{source}"}}': prompt,
                }
                moved = {name: prompt * KV_BYTES, "count": count} if name.startswith("decode") else moved
            point[end]["workers"]["decode-0"]["metrics"] |= {
                "vllm:nixl_bytes_transferred_sum": moved.get("decode-0", 0),
                "vllm:nixl_bytes_transferred_count": moved.get("count", 0),
                "vllm:nixl_num_failed_transfers_total": 0,
            }


def test_another_engine_is_judged_by_its_own_counters(tmp_path: Path) -> None:
    run = good(concurrency=(4, 8))
    vllm(run)
    assert failures(verdicts(run, tmp_path)) == {}
    metrics = run.metrics("decode-0", point=1)
    metrics["vllm:nixl_num_failed_transfers_total"] = 2.0
    metrics['vllm:prompt_tokens_by_source_total{engine="0",source="local_compute"}'] = 640.0
    found = failures(verdicts(run, tmp_path))
    assert found == {
        "kv-failures": "decode-0: vllm:nixl_num_failed_transfers_total moved by 2",
        "decode-only": "decode-0 computed 640 prompt tokens itself",
    }


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
    assert found.evidence["caution"].startswith("read delay of the client is p99 40.0 ms beside a p99 TTFT of 1")
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


def test_the_last_lines_say_that_the_model_was_cut_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = good()
    run.plan["truncated"] = "json-model-override-args cuts the model down to 20 layers"
    assert main(["gate", str(run.write(tmp_path))]) == 0
    said = capsys.readouterr().out
    assert said.endswith("note  the model is not whole: json-model-override-args cuts the model down to 20 layers\nVALID\n")


def test_the_command_names_the_point_of_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = good()
    run.measured(1)[2].output_tokens = 5
    assert main(["gate", str(run.write(tmp_path))]) == 3
    said = capsys.readouterr().out
    assert "  FAIL  output-tokens" in said
    assert "concurrency 8: 1 answers do not have the length" in said
    assert said.endswith(f"INVALID: 1 of {len(RUN_CHECKS) + 2 * len(POINT_CHECKS)} checks failed\n")
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
