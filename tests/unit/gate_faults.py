"""Runs spoilt in one place each: which check catches it, and what it says. docs/validity.md is made of these tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from unit.runfolder import KV_BYTES, Run

from pdbench.records import NOT_REPORTED

KV_CHECKS = ("kv-failures", "kv-transfer", "kv-bytes", "decode-only")


def lose_a_record(run: Run) -> None:
    """A request without a record."""
    run.records.remove(run.measured()[7])
    run.asked[0]["num_requests"] = 24


def repeat_a_record(run: Run) -> None:
    """A request recorded twice."""
    run.measured()[3].index = 4


def fail_a_request(run: Run) -> None:
    """One request more than allowed fails."""
    record = run.measured()[5]
    record.ok, record.status, record.error = False, 500, "HTTP 500: Decode transfer failed"
    record.first_s = record.end_s = math.nan
    record.chunk_s, record.chunk_tokens = [], []


def stop_early(run: Run) -> None:
    """An answer ends before the forced length."""
    run.measured()[2].output_tokens = 5


def report_no_tokens(run: Run) -> None:
    """The server reports no token count."""
    run.measured()[2].output_tokens, run.measured()[2].chunk_tokens = NOT_REPORTED, []


def send_another_prompt(run: Run) -> None:
    """The server counts another prompt length."""
    run.measured()[2].prompt_tokens_asked = 65


def succeed_with_nothing(run: Run) -> None:
    """HTTP 200 and "ok" without a token."""
    record = run.measured()[1]
    record.output_tokens = record.output_tokens_asked = 0
    record.chunk_s, record.chunk_tokens = [], []


def first_token_at_once(run: Run) -> None:
    """A TTFT of 0."""
    record = run.measured()[1]
    record.first_s = record.sent_s
    record.chunk_s[0] = record.first_s


def tokens_out_of_order(run: Run) -> None:
    """Tokens out of order."""
    chunks = run.measured()[1].chunk_s
    chunks[2], chunks[3] = chunks[3], chunks[2]


def sent_too_early(run: Run) -> None:
    """Sent before it was due."""
    record = run.measured()[1]
    record.scheduled_s = record.sent_s + 0.002


def end_too_early(run: Run) -> None:
    """A request ends before its last token."""
    run.measured()[1].end_s = run.measured()[1].chunk_s[-2]


def forget_a_time(run: Run) -> None:
    """A success without all of its times."""
    run.measured()[1].scheduled_s = math.nan


def hit_the_cache(run: Run) -> None:
    """A prompt answered from a prefix cache."""
    run.measured()[1].cached_tokens = 63


def lose_a_worker_at_the_router(run: Run) -> None:
    """A worker is missing at the router."""
    run.side("after")["router"]["workers"].pop()


def strange_worker_at_the_router(run: Run) -> None:
    """A worker that is not in the plan."""
    run.side("before")["router"]["workers"][0]["url"] = "http://127.0.0.1:39999"


def wrong_role_at_the_router(run: Run) -> None:
    """A worker in another role."""
    run.side("before")["router"]["workers"][-1]["worker_type"] = "decode"


def sick_worker_at_the_router(run: Run) -> None:
    """A worker held for unhealthy."""
    run.side("after")["router"]["workers"][1]["is_healthy"] = False


def router_silent(run: Run) -> None:
    """The router's list cannot be read."""
    run.side("after")["router"] = {"workers": [], "readiness": {}, "error": "connection refused"}


def idle_worker(run: Run) -> None:
    """A worker gets no request."""
    counters, busy = run.metrics("prefill-1"), run.metrics("prefill-0")
    for name, value in counters.items():
        before = run.metrics("prefill-1", "before").get(name, 0.0)
        busy[name] += value - before
        counters[name] = before


def transfer_fails(run: Run) -> None:
    """A KV transfer fails, every answer is 200."""
    run.metrics("decode-0")['sglang:num_transfer_failed_reqs_total{engine_type="decode",tp_rank="0"}'] = 1.0


def bootstrap_fails(run: Run) -> None:
    """A bootstrap fails."""
    run.metrics("prefill-2")['sglang:num_bootstrap_failed_reqs_total{tp_rank="0"}'] = 3.0


def nothing_transferred(run: Run) -> None:
    """Nothing is transferred, every answer is right."""
    for name in ("prefill-0", "prefill-1", "prefill-2"):
        for end in ("before", "after"):
            metrics = run.metrics(name, end)
            for counter in [key for key in metrics if "kv_transfer" in key]:
                del metrics[counter]


def one_transfer_missing(run: Run) -> None:
    """One transfer fewer than answers."""
    for name in ("prefill-0", "prefill-1", "prefill-2"):
        metrics = run.metrics(name)
        for counter in [key for key in metrics if "kv_transfer_total_mb_count" in key]:
            metrics[counter] -= name == "prefill-0"


def empty_transfers(run: Run) -> None:
    """Transfers of 0 bytes."""
    for name in ("prefill-0", "prefill-1", "prefill-2"):
        metrics = run.metrics(name)
        metrics.update({key: 0.0 for key in metrics if "kv_transfer_total_mb_sum" in key})


def answers_from_elsewhere(run: Run) -> None:
    """Fewer tokens counted than received."""
    for key in run.metrics("decode-0"):
        if "generation_tokens_total" in key:
            run.metrics("decode-0")[key] = 100.0


def counter_falls(run: Run) -> None:
    """A counter falls."""
    for key in run.metrics("decode-0", "before") | run.metrics("decode-0"):
        if "e2e_request_latency_seconds_count" in key:
            run.metrics("decode-0", "before")[key] = 400.0


def started_again(run: Run) -> None:
    """A start-up time changes."""
    run.side("after")["workers"]["prefill-0"]["server_info"]["startup_time"] = {"load_weight": 3.9}


def interrupted(run: Run) -> None:
    """The run is stopped half-way."""
    run.progress |= {"state": "stopped", "point": 1, "done": 12, "message": "SIGTERM"}


def point_missing(run: Run) -> None:
    """A load point without records."""
    run.progress["points"] = 2


def lagging_loop(run: Run) -> None:
    """The event loop lags."""
    run.clients[0]["loop_lag_ms"]["p99"] = 150.0


def unknown_loop(run: Run) -> None:
    """The lag was not recorded."""
    run.clients[0]["loop_lag_ms"] = {"p50": None, "p99": None, "max": None}


def sent_late(run: Run) -> None:
    """Requests go out late."""
    for record in run.measured():
        record.scheduled_s -= 0.15


def load_not_made(run: Run) -> None:
    """Less load than configured."""
    run.clients[0]["delivered_load"] = 0.8


def load_unknown(run: Run) -> None:
    """The load was not recorded."""
    run.clients[0]["delivered_load"] = None


def calibrate(run: Run, **spoilt: object) -> None:
    """Say what `pdbench selfcheck` found before the load, spoilt as told."""
    entry: dict[str, object] = {
        "concurrency": 8,
        "ttft_wrong_by": {"mean": 0.8, "p99": 6.0},
        "itl_wrong_by": {"mean": 0.01, "p99": 0.1},
        "most_tokens_per_s": 40000.0,
        "grade": "A",
        "reasons": [],
    }
    run.selfcheck = {"schema": 1, "grade": "A", "keeps_up": True, "points": [{**entry, **spoilt}]}


def client_too_slow(run: Run) -> None:
    """Beside a server of known timing the client did not keep up."""
    calibrate(run, grade="F", reasons=["the client did not keep up: it delivered 70% of the load (least: 90%)"])


def client_wrong(run: Run) -> None:
    """Beside a server of known timing the client's TTFT was wrong by a good part of what is measured."""
    calibrate(run, grade="C", ttft_wrong_by={"mean": 31.0, "p99": 60.0})


def client_wrong_about_gaps(run: Run) -> None:
    """Beside a server of known timing the client's ITL was wrong."""
    calibrate(run, grade="C", itl_wrong_by={"mean": 1.9, "p99": 3.0})


def never_calibrated(run: Run) -> None:
    """The client was to be calibrated, and was not."""
    run.manifest["bench_selfcheck"] = True


def calibration_failed(run: Run) -> None:
    """The client could not be calibrated."""
    run.selfcheck = {"schema": 1, "error": "the truth server does not start", "keeps_up": False, "points": []}


def fewer_bytes(run: Run) -> None:
    """Less KV cache moves than the prompts imply (known KV bytes per token)."""
    tell_kv_bytes(run)
    for name in ("prefill-0", "prefill-1", "prefill-2"):
        metrics = run.metrics(name)
        metrics.update({key: value * 0.9 for key, value in metrics.items() if "kv_transfer_total_mb_sum" in key})


def more_bytes(run: Run) -> None:
    """More KV cache moves than the prompts imply (known KV bytes per token)."""
    tell_kv_bytes(run)
    metrics = run.metrics("prefill-1")
    metrics.update({key: value * 1.2 for key, value in metrics.items() if "kv_transfer_total_mb_sum" in key})


def tell_kv_bytes(run: Run) -> None:
    for end in ("before", "after"):
        for entry in run.side(end)["workers"].values():
            entry["server_info"]["kv_bytes_per_token"] = KV_BYTES


def one_worker_moves_less(run: Run) -> None:
    """One worker moves fewer bytes per prompt token than the others."""
    metrics = run.metrics("prefill-2")
    metrics.update({key: value * 0.8 for key, value in metrics.items() if "kv_transfer_total_mb_sum" in key})


def decode_computes(run: Run) -> None:
    """A decode worker computes prompts itself."""
    run.metrics("decode-0")['sglang:realtime_tokens_total{tp_rank="0",mode="prefill_compute"}'] = 1792.0


def hits_counted_by_the_engine(run: Run) -> None:
    """The engine counts cached tokens of which the answers say nothing."""
    run.metrics("prefill-1")['sglang:cached_tokens_total{cache_source="device"}'] = 448.0
    for record in run.records:
        record.cached_tokens = NOT_REPORTED


def cache_not_emptied(run: Run) -> None:
    """A worker does not empty its cache before the point (requests are running)."""
    run.evidence["points"][0]["reset"]["prefill-1"]["flush"] = "HTTP 400: Flush cache failed."


def slowed_and_not_released(run: Run) -> None:
    """A worker does not confirm that slow_down is off."""
    run.evidence["points"][0]["reset"]["decode-0"]["full_speed"] = 'HTTP 401: {"error":"Unauthorized"}'


def never_asked(run: Run) -> None:
    """A worker was not brought to its starting state."""
    run.evidence["points"][0]["reset"]["decode-0"] = {"flush": "ok"}


def slowed_during_the_point(run: Run) -> None:
    """A worker is slowed down after the point."""
    run.side("after")["workers"]["decode-0"]["server_info"]["slow_down_s"] = 0.02


def profiled_during_the_point(run: Run) -> None:
    """A profile runs after the point."""
    run.side("after")["workers"]["prefill-1"]["server_info"]["profiling"] = True


def profile_not_stopped(run: Run) -> None:
    """A profile that runs before the point cannot be stopped."""
    run.evidence["points"][0]["reset"]["prefill-0"]["profile"] = "HTTP 500: Internal Server Error"


def profile_in_the_log(run: Run) -> None:
    """A worker's log has a profile that never ended."""
    run.logs["gh200-pd-prefill-0.log"] = "Profiling done. Traces are saved to: x\nProfiling starts. Traces will be saved to: x"


def mooncake_fell_back_to_tcp(run: Run) -> None:
    """Mooncake finds no RDMA device and takes TCP, RDMA was expected."""
    expect(run, "rdma")
    run.logs["gh200-pd-prefill-1.log"] = "I1121 transfer_engine_impl.cpp] Using TCP transport (no HCA detected)"


def ucx_took_nvlink(run: Run) -> None:
    """UCX moves it over CUDA IPC, TCP was expected."""
    run.logs["a100-pd-decode-0.log"] = "|  0..inf | zero-copy cuda_ipc/cuda |"


def ucx_may_not_use_it(run: Run) -> None:
    """UCX_TLS leaves out what was expected."""
    expect(run, "cuda_ipc")
    run.plan["workers"][0]["ranks"][0]["env"]["UCX_TLS"] = "tcp,cuda_copy"


def counted_over_another_way(run: Run) -> None:
    """A decode worker counts transfers of one pair over another transport."""
    run.metrics("decode-0")['pdbench_emulator_kv_transfers_total{peer="127.0.0.1:31001",transport="rdma"}'] = 3.0


def no_pairs(run: Run) -> None:
    """The plan names no pairs."""
    run.plan["pairs"] = []


def expect(run: Run, transport: str) -> None:
    for pair in run.plan["pairs"]:
        pair["expected_transport"] = transport


def lose_a_file(run: Run) -> None:
    """A file is missing or broken."""
    run.lost = "evidence.json"


#: (checks that fail, of which the first says it; what it says; how the run is spoilt)
def verify(run: Run, **spoilt: object) -> None:
    """Record that two prompts were verified over every pair, the last one with what differs."""
    row = {"prompts": 2, "tokens": 62, "wrong_prompts": 0, "wrong_tokens": 0, "mean_nats": 0.001, "worst_nats": 0.01, "error": ""}
    rows = [{"prefill": pair["prefill"], "decode": pair["decode"], **row} for pair in run.plan["pairs"]]
    rows[-1].update(spoilt)
    run.verify_outputs = 2
    run.evidence["verify"] = {"prompts": 2, "output_tokens": 32, "limit_nats": 0.2, "token_nats": 0.5, "pairs": rows}


def wrong_kv(run: Run) -> None:
    """The KV cache of one pair arrives wrong, every answer is 200 and of the right length."""
    verify(run, wrong_prompts=1, wrong_tokens=29, worst_nats=8.25)


def unverified_pair(run: Run) -> None:
    """A pair that was to be verified does not answer."""
    verify(run, prompts=0, tokens=0, error="decode-0: HTTP 500 Decode transfer failed")


def half_verified(run: Run) -> None:
    """Fewer prompts are verified than were to be."""
    verify(run, prompts=1)


def never_verified(run: Run) -> None:
    """What was to be verified was not recorded."""
    run.verify_outputs = 2


SPOILT: list[tuple[tuple[str, ...], str, Callable[[Run], None]]] = [
    (("requests-accounted",), "no record of 1 of 24 (index 7)", lose_a_record),
    (("requests-accounted",), "more than one record of index 4", repeat_a_record),
    (("error-rate",), "1 of 24 requests failed (4.17%; allowed: 0.00%): 1 x HTTP 500: Decode transfer failed", fail_a_request),
    (("output-tokens",), "request 2: 5 of 6", stop_early),
    (("output-tokens",), "reported no token count for 1 answers", report_no_tokens),
    (("prompt-tokens",), "request 2: 64 for 65", send_another_prompt),
    (("no-empty-success",), "1 requests count as successes without output (index 1)", succeed_with_nothing),
    (("timing",), "request 1: TTFT is 0.000 ms", first_token_at_once),
    (("timing",), "request 1: tokens out of order", tokens_out_of_order),
    (("timing",), "request 1: sent before it was due", sent_too_early),
    (("timing",), "request 1: tokens outside of its first and last", end_too_early),
    (("timing",), "request 1: a success without all of its times", forget_a_time),
    (("prefix-cache",), "1 prompts were answered from the prefix cache (63 tokens", hit_the_cache),
    (("ratio",), "prefill http://127.0.0.1:30002 was missing at the router after the point", lose_a_worker_at_the_router),
    (("ratio",), "http://127.0.0.1:39999 before the point, which is not in the plan", strange_worker_at_the_router),
    (("ratio",), "decode http://127.0.0.1:30002 before the point, which is not in the plan", wrong_role_at_the_router),
    (("ratio",), "for unhealthy after the point", sick_worker_at_the_router),
    (("ratio",), "not read after the point: connection refused", router_silent),
    (("workers-served",), "prefill-1 served nothing (sglang:prompt_tokens_total moved by 0)", idle_worker),
    (("engine-counts",), "generation_tokens_total of decode-0 moved by 100, the client's answers imply", answers_from_elsewhere),
    (("no-restart",), "decode-0 restarted during the point (sglang:e2e_request_latency_seconds_count fell", counter_falls),
    (("no-restart",), "prefill-0 restarted during the point (startup_time changed", started_again),
    (("kv-correct",), "prefill-2 to decode-0: the KV cache of 1 of 2 prompts arrived wrong (29 of 62 tokens are not", wrong_kv),
    (("kv-correct",), "prefill-2 to decode-0: could not be verified: decode-0: HTTP 500 Decode", unverified_pair),
    (("kv-correct",), "prefill-2 to decode-0: 1 of 2 prompts were verified", half_verified),
    (("kv-correct",), "the run was to verify 2 prompts a pair, and recorded nothing of it", never_verified),
    (("kv-failures",), "decode-0: sglang:num_transfer_failed_reqs_total moved by 1", transfer_fails),
    (("kv-failures",), "prefill-2: sglang:num_bootstrap_failed_reqs_total moved by 3", bootstrap_fails),
    (("kv-transfer", "kv-bytes"), "finished 0 KV transfers for 28 answers (prefill-0 shows none of", nothing_transferred),
    (("kv-transfer",), "finished 27 KV transfers for 28 answers", one_transfer_missing),
    (("kv-bytes",), "0 MiB of KV cache moved for 1792 prompt tokens", empty_transfers),
    (("kv-bytes",), "201.6 MiB of KV cache moved for 1792 prompt tokens, 117,965 bytes each: fewer than", fewer_bytes),
    (("kv-bytes",), "more than the 224 MiB that they imply", more_bytes),
    (("kv-bytes",), "prefill-2 104,858 bytes per prompt token, the run's median is 131,072", one_worker_moves_less),
    (("decode-only",), "decode-0 computed 1792 prompt tokens itself", decode_computes),
    (("prefix-cache",), "the engines took 448 prompt tokens from their prefix caches", hits_counted_by_the_engine),
    (("prefix-cache",), "prefill-1 did not confirm that its cache is empty (HTTP 400: Flush cache failed.)", cache_not_emptied),
    (("no-leftovers",), "decode-0 did not confirm that slow_down is off (HTTP 401", slowed_and_not_released),
    (("no-leftovers",), "decode-0 did not confirm that slow_down is off (it was not asked)", never_asked),
    (("no-leftovers",), "decode-0 was slowed down after the point: 0.02 s before each step", slowed_during_the_point),
    (("no-leftovers",), "a profile was running on prefill-1 after the point", profiled_during_the_point),
    (("no-leftovers",), "a profile was running on prefill-0 and was not stopped (HTTP 500", profile_not_stopped),
    (("no-leftovers",), "a profile was started on prefill-0 and not ended (its log)", profile_in_the_log),
    (("transport",), "prefill-1 to decode-0: tcp seen (log of prefill-1), rdma expected", mooncake_fell_back_to_tcp),
    (("transport",), "prefill-0 to decode-0: cuda_ipc seen (log of decode-0), tcp expected", ucx_took_nvlink),
    (("transport",), "prefill-0 to decode-0: tcp seen (UCX_TLS of prefill-0), cuda_ipc expected", ucx_may_not_use_it),
    (("transport",), "prefill-1 to decode-0: rdma seen (pdbench_emulator_kv_transfers_total)", counted_over_another_way),
    (("transport",), "plan.json names no prefill-decode pairs", no_pairs),
    (
        ("files", "prefix-cache", "ratio", "workers-served", "engine-counts", "no-leftovers", *KV_CHECKS),
        "evidence.json is missing",
        lose_a_file,
    ),
    (("complete",), "incomplete: stopped at point 1 of 1, request 12 of 24: SIGTERM", interrupted),
    (("complete",), "incomplete: 1 of 2 load points have records", point_missing),
    (("client-loop",), "read delay of the client: p99 150.0 ms (bound 100 ms): the client did not keep up", lagging_loop),
    (("client-loop",), "recorded nothing of it: read delay", unknown_loop),
    (("client-on-time",), "sending after a request was due: p99 150.3 ms (bound 100 ms)", sent_late),
    (("client-load",), "delivered 80.0% of the configured load (concurrency 4;", load_not_made),
    (("client-load",), "did not record which load it delivered", load_unknown),
    (("client-calibrated",), "with 8 requests in flight the client did not keep up: it delivered 70%", client_too_slow),
    (("client-calibrated",), "its mean TTFT is wrong by 31.0 ms (bound 10.0; ", client_wrong),
    (("client-calibrated",), "its ITL is wrong by 1.9 ms (bound 0.8; ", client_wrong_about_gaps),
    (("client-calibrated",), "selfcheck.json is missing", never_calibrated),
    (("client-calibrated",), "could not be calibrated: the truth server does not start", calibration_failed),
]  # fmt: skip


@dataclass(frozen=True)
class Live:
    """A fault given to real emulated workers behind the real router, under `pdbench run` (tests/local/test_gate_faults.py).

    ``checks``: exactly those that fail, of which the first says ``says``; none where the run must stay valid, and
    ``says`` then stands in what the run recorded. ``replays``: the public failure that it repeats. ``also``: checks that may
    fail, too, as a consequence and depending on the moment.
    """

    name: str
    what: str
    checks: tuple[str, ...]
    says: str
    replays: str = ""
    also: tuple[str, ...] = ()


LIVE = [
    Live(
        "transfers_fail",
        "every KV transfer fails from the middle of the run on, the router answers 200",
        ("error-rate", "kv-failures"),
        "requests failed",
        "srt-slurm 429",
    ),
    Live("zero_tokens", "HTTP 200, and not one token", ("error-rate",), "requests failed", "srt-slurm 429"),
    Live(
        "empty_first_chunk",
        "an event without text or tokens comes at once",
        (),
        "TTFT is that of the first token",
        "SGLang 9585, 12389",
    ),
    Live(
        "decode_recomputes",
        "decode computes every prompt itself",
        ("kv-transfer", "kv-bytes", "decode-only"),
        "finished 0 KV transfers",
        "smg with vLLM workers",
    ),
    Live(
        "wrong_kv",
        "the KV cache arrives wrong at a decode worker, every answer is 200 and of the right length",
        ("kv-correct",),
        "the KV cache of 2 of 2 prompts arrived wrong",
        "InferenceX 1944",
    ),
    Live(
        "warm_cache",
        "another client sends the measured prompts while the point warms up",
        ("prefix-cache",),
        "prompts were answered from the prefix cache",
        "SGLang bench on a warm server",
    ),
    Live("repeat", "the same run again, same seed, on warm caches", (), "the caches were emptied in between"),
    Live("wrong_ratio", "the router has lost a prefill worker", ("ratio", "workers-served"), "was missing at the router"),
    Live(
        "restart",
        "a decode worker is killed and started again in the window",
        ("no-restart", "error-rate", "engine-counts"),
        "decode-0 restarted during the point",
        also=("workers-served", "kv-failures", "ratio"),
    ),
    Live(
        "slowed", "a decode worker is slowed down during the run", ("no-leftovers",), "decode-0 was slowed down after the point"
    ),
    Live("slowed_before", "a slow_down is left over from before", (), "it was released before the point"),
    Live("profiled", "a profile is started during the run", ("no-leftovers",), "a profile was running on prefill-0 after"),
    Live("profiled_before", "a profile is left over from before", (), "it was stopped before the point"),
    Live("other_transport", "TCP moves the KV cache of a pair for which the plan expects RDMA", ("transport",), "tcp seen"),
    Live(
        "late_client",
        "the client is held up for 0.2 s twice a second",
        ("client-loop", "client-on-time"),
        "the client did not keep up",
        "vLLM 39963, guidellm 1048",
        # What was held up comes all at once.
        also=("client-load",),
    ),
]
