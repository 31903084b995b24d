"""The page: what it says first, that it says the truth, and that nothing in a run can break out of it."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from unit.runfolder import Run, good, plan, worker

from pdbench.cli import main
from pdbench.gate.rundata import RunData
from pdbench.metrics import Slo
from pdbench.report import words
from pdbench.report.picture import cluster
from pdbench.report.tables import number

EVIL = '"><script>alert(1)</script>'


class Page(HTMLParser):
    """The page as a reader gets it: its text, its tags and what it would load from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self._hidden = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._hidden = tag if tag in ("style", "script") else ""
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._hidden = ""

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text.append(data)

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the plots out: they have their own tests, and take seconds."""
    for module in ("cli", "page"):
        drawn = f"pdbench.report.{module}.draw"
        monkeypatch.setattr(drawn, lambda name, sheet, *kinds: [f"<svg>{sheet.note}</svg>".encode() for _ in kinds])


def report(run: Run, folder: Path, gate: bool = True) -> Page:
    run.write(folder)
    if gate:
        main(["gate", str(folder)])
    assert main(["report", str(folder)]) == 0
    return Page((folder / "report.html").read_text())


def test_a_valid_run_is_told_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = good(concurrency=(4, 8))
    run.slo = Slo(ttft_ms=100.0, tpot_ms=50.0)
    page = report(run, tmp_path / "run-7")
    assert capsys.readouterr().out.endswith(f"report: {tmp_path / 'run-7' / 'report.html'}\n")
    for sentence in (
        "Valid. All 44 checks passed",
        "3p1d: 3 prefill workers and 1 decode worker of sglang 0.5.23, serving Qwen/Qwen2.5-3B-Instruct as qwen, "
        "on 4 GPUs of 2 hosts (gh200, a100).",
        "The KV cache moves with nixl, expected over TCP for 3 prefill-decode pairs: gh200 is infiniband and a100 is roce: "
        "no common RDMA path, so TCP.",
        "2 load points: concurrency 4, concurrency 8; 48 requests in all, none of them failed.",
        "Prompts of 64 tokens and forced outputs of 6 tokens.",
        "Goodput: requests within TTFT ≤ 100 ms, TPOT ≤ 50 ms",
        "Time per output token after the first: (E2E - TTFT) / (n - 1) , seconds",
        "ansible-playbook bench.yml -e @results/run-7/manifest.json",
        "server_metrics.parquet was not recorded",
        "requests under full load are too few to find it (at least 50).",
        "It begins when the load is full",
    ):
        assert sentence in page.said
    assert "INVALID" not in page.said
    assert "emulated" not in page.said
    assert sorted(path.name for path in (tmp_path / "run-7").glob("*.png")) == [
        "in_flight.png", "itl.png", "latency.png", "throughput.png", "ttft.png",
    ]  # fmt: skip
    assert len(list((tmp_path / "run-7").glob("*.svg"))) == 5


@pytest.mark.usefixtures("quick")
def test_a_model_that_was_cut_down_is_said(tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    assert "not whole" not in report(run, tmp_path / "whole").said
    run.plan["truncated"] = "json-model-override-args cuts the model down to 20 layers"
    said = report(run, tmp_path / "cut").said
    assert (
        "The model is not whole: json-model-override-args cuts the model down to 20 layers. Nothing here holds for Qwen" in said
    )
    assert "The model is not whole. Here json-model-override-args cuts" in said.partition("What was deployed")[0]
    # a figure may be shown without the page
    assert "the model is not whole: json-model-override-args cuts" in (tmp_path / "cut" / "ttft.svg").read_text()
    assert "not whole" not in (tmp_path / "whole" / "ttft.svg").read_text()


@pytest.mark.usefixtures("quick")
def test_the_tables_hold_the_figures_of_the_summary(tmp_path: Path) -> None:
    page = report(good(concurrency=(4,)), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    cells = [summary[key] for key in ("request_throughput", "output_throughput", "output_throughput_per_gpu")]
    assert " ".join(map(number, cells)) in page.said
    assert " ".join(number(summary[f"{name}_ms"][q]) for name in ("ttft", "tpot") for q in ("p50", "p95", "p99")) in page.said


@pytest.mark.usefixtures("quick")
def test_the_steady_window_stands_beside_the_whole_with_intervals(tmp_path: Path) -> None:
    run = good(concurrency=(4,), num_requests=400)
    run.slo = Slo(ttft_ms=100.0)
    page = report(run, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    steady = summary["steady"]
    low, high = steady["intervals"]["ttft_ms"]["p50"]
    assert f"{number(steady['ttft_ms']['p50'])} ({number(low)}–{number(high)})" in page.said
    cells = [number(summary[key]["p50"]) for key in ("itl_token_ms", "normalised_latency_ms", "ttft_scheduled_ms")]
    assert all(cell in page.said.partition("Latency seen otherwise")[2].partition("Steady window")[0] for cell in cells)
    low, high = summary["goodput"]["attainment_interval"]
    assert f"({100 * low:.1f}–{100 * high:.1f})" in page.said


def test_where_the_first_token_was_is_shown_in_a_figure_a_table_and_words(tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    served = 28  # 4 of the warm-up, 24 measured
    for name in ("prefill-0", "prefill-1", "prefill-2"):
        stage = 'sglang:per_stage_req_latency_seconds_{}{{stage="prefill_forward"}}'
        run.metrics(name).update({stage.format("sum"): served / 3 * 0.02, stage.format("count"): served / 3})
    page = report(run, tmp_path)
    forward = "Mean TTFT by stage (ms) load mean TTFT router and network bootstrap prefill queue prefill KV allocation"
    assert forward in page.said
    assert "prefill 20.0 ms" in page.said
    assert "not reported: router and network, bootstrap, prefill queue, KV allocation" in page.said
    assert "(28 requests, warm-up among them)." in page.said
    assert "not reported not reported not reported 20.0 not reported" in page.said
    assert (tmp_path / "ttft_split.png").stat().st_size > 5000
    assert json.loads((tmp_path / "summary.json").read_text())["attribution"] is None  # the run itself was not given evidence


@pytest.mark.usefixtures("quick")
def test_an_invalid_run_says_why_at_the_top(tmp_path: Path) -> None:
    run = good(concurrency=(4, 8))
    run.measured(1)[2].output_tokens = 5
    run.progress |= {"state": "stopped", "message": "SIGTERM"}
    page = report(run, tmp_path)
    top = page.said.partition("What was deployed")[0]
    assert "INVALID RUN: 3p1d" in top
    assert "Invalid run: do not use these figures." in top
    assert "incomplete: stopped at point 2 of 2, request 24 of 24: SIGTERM" in top
    assert "concurrency 8: 1 answers do not have the length that was forced (request 2: 5 of 6)" in top
    assert "Results (of an invalid run)" in page.said
    assert "Valid." not in page.said


@pytest.mark.usefixtures("quick")
def test_a_run_that_nobody_checked_is_not_shown_as_good(tmp_path: Path) -> None:
    page = report(good(), tmp_path, gate=False)
    assert "Not checked: do not use these figures yet." in page.said
    assert "Valid." not in page.said
    (tmp_path / "validity.json").write_text('{"valid": true}')
    assert words.verdict(RunData(tmp_path)).valid is None


def test_a_verdict_that_contradicts_itself_is_no_good_one(tmp_path: Path) -> None:
    bad = {"id": "timing", "ok": False, "point": 0, "message": "TTFT is 0", "evidence": {}}
    (tmp_path / "validity.json").write_text(json.dumps({"schema": 1, "valid": True, "checks": [bad]}))
    assert words.verdict(RunData(tmp_path)).valid is False


@pytest.mark.usefixtures("quick")
def test_an_emulated_run_says_so_at_the_top(tmp_path: Path) -> None:
    page = report(good(emulated=True), tmp_path)
    top = page.said.partition("What was deployed")[0]
    assert "No GPU was used. The engine was emulated: these figures say nothing about hardware." in top


@pytest.mark.usefixtures("quick")
def test_an_emulated_run_tells_its_profile_its_lateness_and_the_way_of_the_kv(tmp_path: Path) -> None:
    run = good()
    run.plan["emulated"] = True
    for name in ("prefill-0", "decode-0"):
        run.side("after")["workers"][name]["server_info"]["emulated_profile"] = "a made-up card"
    run.metrics("decode-0")["pdbench_emulator_token_lateness_seconds_sum"] = 0.5
    run.metrics("decode-0")["pdbench_emulator_token_lateness_seconds_count"] = 1000.0
    run.metrics("decode-0")['pdbench_emulator_kv_transfers_total{peer="127.0.0.1:31001",transport="tcp"}'] = 3.0
    said = report(run, tmp_path / "run").said
    assert "Times came from the performance model of a made-up card." in said
    assert "The emulator was 0.5 ms late with a token on average" in said
    assert "It was seen to move over TCP for 1 of 3 pairs." in said


def test_what_a_reader_must_know_of_valid_figures_is_noted(tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    run.clients[0] |= {"tokens_per_event": 4.0}
    run.clients[0]["loop_lag_ms"]["p99"] = 40.0
    said = report(run, tmp_path).said
    assert "Valid." in said
    assert "Note, concurrency 4: one event holds 4.0 output tokens on average" in said
    assert "Note, concurrency 4: read delay of the client is p99 40.0 ms beside a p99 TTFT of 1" in said


@pytest.mark.usefixtures("quick")
def test_the_page_is_one_file_without_script(tmp_path: Path) -> None:
    page = report(good(), tmp_path)
    assert "script" not in page.tags
    assert page.loads
    assert {address.partition(",")[0] for address in page.loads} == {"data:image/svg+xml;base64"}
    assert "prefers-color-scheme: dark" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("quick")
def test_nothing_in_a_run_breaks_out_of_the_page(tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    for key in ("model", "served_model_name", "engine", "transfer_backend_reason"):
        run.plan[key] = EVIL
    run.plan["pairs"][0] |= {"prefill": EVIL, "expected_transport": EVIL}
    run.plan["workers"][0] |= {"name": EVIL}
    run.plan["workers"][0]["ranks"][0]["host"] = EVIL
    run.plan["router"] |= {"name": EVIL, "host": EVIL}
    run.plan["hosts"][EVIL] = {"gpus": [0], "rdma_fabric": EVIL}
    run.manifest["note"] = EVIL
    run.progress |= {"state": EVIL, "message": EVIL}
    record = run.measured()[0]
    record.ok, record.error, record.first_s, record.end_s = False, EVIL, math.nan, math.nan
    record.chunk_s = []
    page = report(run, tmp_path)
    assert "script" not in page.tags
    assert page.said.count("alert(1)") >= 10


@pytest.mark.parametrize("name", ["plan.json", "summary.json", "evidence.json", "manifest.json", "requests.parquet"])
@pytest.mark.usefixtures("quick")
def test_a_run_with_a_missing_file_has_a_report_that_says_so(name: str, tmp_path: Path) -> None:
    folder = good(concurrency=(4,)).write(tmp_path, leave_out=[name])
    main(["gate", str(folder)])
    assert main(["report", str(folder)]) == 0
    page = Page((folder / "report.html").read_text())
    assert re.search(rf"{re.escape(name)}( is|:) missing|{re.escape(name)} was not recorded", page.said)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [([], 2, "DIR"), (["{}/nowhere"], 1, "is not a folder"), (["{}"], 1, "is not the folder of a run")],
)
def test_bad_usage(args: list[str], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *(arg.format(tmp_path) for arg in args)]) == code
    assert says in capsys.readouterr().err


# -- the picture of the cluster


def drawn(deployed: dict[str, object]) -> ElementTree.Element:
    return ElementTree.fromstring(str(cluster(deployed)))


def texts(svg: ElementTree.Element) -> list[str]:
    return ["".join(node.itertext()) for node in svg.iter("{http://www.w3.org/2000/svg}text")]


def classes(svg: ElementTree.Element, kind: str) -> list[str]:
    return [node.get("class", "") for node in svg.iter() if kind in node.get("class", "").split()]


def test_the_picture_shows_workers_gpus_and_ways() -> None:
    svg = drawn(plan("3p1d"))
    said = texts(svg)
    assert {"client", "router", "prefill-0", "prefill-2", "decode-0", "not used"} <= set(said)
    assert "gh2004 GPUs, infiniband" in said
    assert "KV cache, expected over tcp: 3 prefill-decode pairs" in said
    chips = [c for c in classes(svg, "chip") if "idle" not in c]
    assert sorted(chips) == ["chip role-decode"] * 2 + ["chip role-prefill"] * 4  # one each more in the legend
    assert len(classes(svg, "kv")) == 2  # between the hosts, and in the legend


def test_aggregated_workers_have_no_way_of_the_kv_cache() -> None:
    svg = drawn(plan("4agg"))
    assert classes(svg, "kv") == []
    assert [c for c in classes(svg, "worker") if "idle" not in c] == ["worker role-aggregated"] * 4


def test_requests_go_to_the_first_rank_of_a_worker() -> None:
    deployed = plan("1p1d")
    big = worker("decode-0", "decode", "n1", range(8), 30001)
    big["ranks"] = [big["ranks"][0], {**big["ranks"][0], "host": "n2", "node_rank": 1}]
    deployed["workers"][1] = big
    svg = drawn(deployed)
    assert {"decode-0, rank 0 of 2", "decode-0, rank 1 of 2"} <= set(texts(svg))
    assert len(classes(svg, "way")) == 1 + 2  # client to router, router to gh200 and n1


@pytest.mark.parametrize("gpus", [1, 8, 16])
@pytest.mark.parametrize("hosts", [1, 2, 12, 50])
def test_nothing_stands_outside_the_picture(hosts: int, gpus: int) -> None:
    deployed = plan("1p1d")
    deployed["hosts"] = {}
    deployed["workers"] = [
        worker(f"{role}-{i}", role, f"a-host-with-a-rather-long-name-{i:03}", range(gpus), 30000)
        for i in range(hosts)
        for role in ("prefill", "decode")
    ]
    names = [(p, d) for p in range(hosts) for d in range(hosts)]
    deployed["pairs"] = [{"prefill": f"prefill-{p}", "decode": f"decode-{d}", "expected_transport": "rdma"} for p, d in names]
    svg = drawn(deployed)
    _, _, width, height = map(float, svg.get("viewBox", "").split())
    boxes = [node for node in svg.iter() if node.tag.endswith("rect")]
    ends = [
        (float(box.get("x", 0)) + float(box.get("width", 0)), float(box.get("y", 0)) + float(box.get("height", 0)))
        for box in boxes
    ]
    assert all(0 < x <= width and 0 < y <= height for x, y in ends)
    for host in (node for node in boxes if node.get("class") == "host"):
        left, right = float(host.get("x", 0)), float(host.get("x", 0)) + float(host.get("width", 0))
        top, bottom = float(host.get("y", 0)), float(host.get("y", 0)) + float(host.get("height", 0))
        inside = [b for b in boxes if "worker" in b.get("class", "") and top < float(b.get("y", 0)) < bottom]
        if left > 100:
            assert all(float(b.get("x", 0)) + float(b.get("width", 0)) <= right for b in inside)
    for path in (node for node in svg.iter() if node.get("class", "").startswith("kv")):
        lanes = [float(x) for x in re.findall(r"H(\d+)", path.get("d", ""))]
        assert all(x <= width for x in lanes)


@pytest.mark.usefixtures("quick")
def test_a_run_on_a_cpu_says_that_no_gpu_was_used(tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    run.plan["on_cpu"] = True
    assert "The engine ran on a CPU: these figures say nothing about hardware" in report(run, tmp_path).said
