"""Other bench clients beside ours. The outputs under data/peers were written by the real clients, run at `pdbench emulate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.runfolder import good

from pdbench.cli import main
from pdbench.gate.rundata import load
from pdbench.peers import beside, drive, read, vocabulary
from pdbench.peers.commands import TOOLS, CannotAskError, Place, command
from pdbench.report import peers as in_report

Json = dict[str, Any]
DATA = Path(__file__).parent / "data" / "peers"
REPO = Path(__file__).parents[2]
RECORDED = {"sglang": DATA / "sglang-completions.jsonl", "vllm": DATA / "vllm-completions.json"}
PLACE = Place("/v/bin/python", "http://127.0.0.1:8000", "m", Path("/run/tokenizer"), Path("/run/out.json"))
POINT: Json = {"point": 1, "concurrency": 8, "request_rate": None, "isl": "64", "osl": "32", "num_requests": 40, "seed": 3}
OPEN: Json = {**POINT, "concurrency": None, "request_rate": 2.5, "arrival": "poisson"}


def option(argv: list[str], flag: str) -> str:
    assert argv.count(flag) == 1, (flag, argv)
    return argv[argv.index(flag) + 1]


@pytest.mark.parametrize("tool", sorted(RECORDED))
def test_what_the_real_client_wrote_is_read_in_our_names(tool: str) -> None:
    figures = read.READERS[tool](RECORDED[tool].read_text(), 40)
    assert (figures["completed"], figures["failed"], figures["output_tokens"]) == (40, 0, 40 * 32)
    for rate, count in (("request", 40), ("input", 40 * 64), ("output", 40 * 32), ("total", 40 * 96)):
        assert figures[f"{rate}_throughput"] * figures["duration_s"] == pytest.approx(count)
    for key in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        quantiles = [figures[key][q] for q in ("p50", "p90", "p95", "p99")]
        assert quantiles == sorted(quantiles)
        assert quantiles[0] > 0 < figures[key]["mean"]
    # Emulator `tiny`, c=4: about 20 ms a token, and E2E is what TTFT and TPOT say.
    assert figures["itl_ms"]["mean"] == pytest.approx(20, rel=0.15)
    whole = figures["ttft_ms"]["mean"] + 31 * figures["tpot_ms"]["mean"]
    assert figures["e2e_ms"]["mean"] == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("tool", sorted(RECORDED))
def test_requests_that_are_not_among_the_completed_failed(tool: str) -> None:
    assert read.READERS[tool](RECORDED[tool].read_text(), 43)["failed"] == 3
    found = json.loads(RECORDED[tool].read_text()) | {"completed": 0}
    assert read.READERS[tool](json.dumps(found), 40)["ttft_ms"]["mean"] is None, "zeros that nobody measured"


@pytest.mark.parametrize("tool", sorted(RECORDED))
@pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"completed": 40}', '{"completed": 1.5}', '{"completed": "40"}', "\x00"])
def test_a_file_that_is_something_else_is_refused(tool: str, text: str) -> None:
    with pytest.raises(read.NotReadableError):
        read.READERS[tool](text, 40)


@pytest.mark.parametrize("tool", sorted(RECORDED))
@given(data=st.data())
def test_a_figure_that_is_none_is_named(tool: str, data: st.DataObject) -> None:
    found = json.loads(RECORDED[tool].read_text())
    key = data.draw(st.sampled_from(["duration", "request_throughput", "mean_ttft_ms", "p99_itl_ms", "median_tpot_ms"]))
    found[key] = data.draw(st.sampled_from([None, float("nan"), float("inf"), "1", True, [1.0]]))
    with pytest.raises(read.NotReadableError, match=key):
        read.READERS[tool](json.dumps(found), 40)


def test_the_load_is_ours() -> None:
    argv = command("sglang", PLACE, "completions", POINT)
    assert argv[0] == "/v/bin/python"
    assert Path(argv[1]).is_file()
    wanted = {"--backend": "sglang-oai", "--max-concurrency": "8", "--num-prompts": "40", "--random-input-len": "64"}
    wanted |= {"--random-output-len": "32", "--random-range-ratio": "1", "--base-url": "http://127.0.0.1:8000"}
    assert {flag: option(argv, flag) for flag in wanted} == wanted
    assert "--request-rate" not in argv
    assert option(command("sglang", PLACE, "generate", OPEN), "--request-rate") == "2.5"
    vllm = command("vllm", PLACE, "chat", {**OPEN, "arrival": "gamma:0.5"})
    wanted = {"--backend": "openai-chat", "--endpoint": "/v1/chat/completions", "--burstiness": "0.5", "--request-rate": "2.5"}
    assert {flag: option(vllm, flag) for flag in wanted} == wanted
    assert "--ignore-eos" in vllm
    assert "--max-concurrency" not in vllm
    assert option(argv, "--seed") != option(command("sglang", PLACE, "completions", {**POINT, "point": 2}), "--seed")


@pytest.mark.parametrize(
    ("tool", "api", "point", "says"),
    [
        ("sglang", "chat", {**OPEN, "arrival": "constant"}, "arrival constant"),
        ("vllm", "chat", {**OPEN, "arrival": "constant"}, "arrival constant"),
        ("vllm", "generate", POINT, "api generate"),
        ("sglang", "chat", {**POINT, "isl": "64-128"}, "isl 64-128"),
        ("vllm", "chat", {**POINT, "osl": None}, "osl None"),
        ("vllm", "chat", {**POINT, "trace": "t.jsonl"}, "trace of load point 1"),
        ("sglang", "chat", {**OPEN, "request_rate_to": 8.0}, "request rate to"),
        ("sglang", "chat", {**POINT, "concurrency": None}, "neither a concurrency nor"),
    ],
)
def test_a_load_that_the_client_cannot_send_is_refused(tool: str, api: str, point: Json, says: str) -> None:
    with pytest.raises(CannotAskError, match=says):
        command(tool, PLACE, api, point)


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_the_version_that_is_named_is_the_one_that_is_installed(tool: str) -> None:
    assert f"{tool}=={TOOLS[tool].version} " in (REPO / "requirements" / f"bench-{tool}-no-deps.txt").read_text()
    assert set(beside.DIFFERENCES) == set(TOOLS) == set(read.READERS)


def test_the_words_are_tokens_of_the_emulator(tmp_path: Path) -> None:
    vocabulary.make(tmp_path, None)
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    words = made["model"]["vocab"]
    assert len(words) == 64_001
    # The emulator cuts words of more than 16 characters.
    assert all(word.isascii() and " " not in word and len(word) <= 16 for word in words)
    assert sorted(words.values()) == list(range(len(words)))
    vocabulary.make(tmp_path / "own", tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "own" / "tokenizer.json").read_text()) == made
    assert "PreTrainedTokenizerFast" in (tmp_path / "own" / "tokenizer_config.json").read_text()


def client(folder: Path, script: str) -> Path:
    """Stand for a virtualenv's Python: it has what the real client was given as its arguments, and the recorded output."""
    path = folder / "python"
    head = f"#!{sys.executable}\nimport os, sys, shutil\nwhere = lambda flag: sys.argv[sys.argv.index(flag) + 1]\n"
    path.write_text(f"{head}{script.replace('RECORDED', repr(str(RECORDED['sglang'])))}\n")
    path.chmod(0o755)
    return path


def run(folder: Path, script: str, key: str = "") -> int:
    """Run the peer after a good run of two load points, of 40 requests each as they were recorded."""
    made = good(concurrency=(4, 8))
    made.write(folder)
    summary = json.loads((folder / "summary.json").read_text())
    for point in summary["points"]:
        point |= {"num_requests": 40, "isl": "64", "osl": "32"}
    (folder / "summary.json").write_text(json.dumps(summary))
    argv = ["peer", str(folder), "--tool", "sglang", "--python", str(client(folder, script)), "--url", "http://127.0.0.1:1"]
    if key:
        (folder / "key").write_text(key)
        argv += ["--api-key-file", str(folder / "key")]
    return main([*argv, "--model", "m"])


VLLM = ("--tool", "vllm", "--python", "p", "--url", "u", "--model", "m")
COPY = "shutil.copyfile(RECORDED, where('--output-file'))"


def test_both_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, f"{COPY}\nprint('key', os.environ['OPENAI_API_KEY'])", key="s3cret") == 0
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    theirs = summary["tools"]["sglang"]
    assert theirs["version"] == "0.5.23"
    assert [point["figures"]["completed"] for point in theirs["points"]] == [40, 40]
    assert "s3cret" not in (tmp_path / "tools" / "sglang" / "tool.json").read_text(), "the key is no argument"
    assert (tmp_path / "tools" / "sglang" / "point-0.log").read_text() == "key s3cret\n"
    assert not (tmp_path / "tools" / "sglang" / "tokenizer").exists()
    (first, _, rows), _ = beside.compared(summary)
    assert first == "sglang"
    ttft = next(row for row in rows if row.name == "TTFT mean (ms)")
    assert ttft.ours == summary["points"][0]["ttft_ms"]["mean"]
    assert ttft.theirs == theirs["points"][0]["figures"]["ttft_ms"]["mean"]
    assert ttft.ours is not None
    assert ttft.theirs is not None
    assert ttft.apart == pytest.approx(ttft.theirs / ttft.ours - 1)
    assert "connection" in ttft.why
    per_gpu = next(row for row in rows if "per GPU" in row.name)
    assert per_gpu.theirs == pytest.approx(theirs["points"][0]["figures"]["output_throughput"] / summary["gpus"])
    assert "SGLang's bench client 0.5.23, run after pdbench" in said
    assert "concurrency 4" in said
    assert "concurrency 8" in said
    assert said.count("how theirs is defined") == 1
    assert main(["peer", str(tmp_path)]) == 0
    assert capsys.readouterr().out == said
    (table, second) = in_report.tables(load(tmp_path))
    assert "concurrency 8" in second.caption
    assert [row[0] for row in table.rows] == [row.name for row in rows]


def test_on_sglangs_own_api_gaps_are_by_token() -> None:
    ours = {"itl_ms": {"mean": 40.0}, "itl_token_ms": {"mean": 10.0}}
    for api, wanted in (("generate", 10.0), ("completions", 40.0)):
        row = next(r for r in beside.rows("sglang", api, ours, {"itl_ms": {"mean": 10.5}}) if r.name == "ITL mean (ms)")
        assert row.ours == wanted
        assert "token" in row.why


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("print('loading'); sys.exit('no such tokenizer')", "is in tools/sglang/point-0.log and ends with: no such"),
        ("pass", "it wrote no point-0.json"),
        ("open(where('--output-file'), 'w').write('{}')", "point-0.json: completed is missing"),
        (f"{COPY} if 'point-1' in where('--output-file') else sys.exit(9)", "load point 0: it ended with exit code 9"),
    ],
)  # fmt: skip
def test_a_client_that_fails_is_told_and_ours_stays(
    script: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("cli", "page"):
        # Plots have their own tests, and take seconds.
        monkeypatch.setattr(f"pdbench.report.{module}.draw", lambda name, sheet, *kinds: [b"<svg/>" for _ in kinds])
    assert run(tmp_path, script) == 1
    said = capsys.readouterr()
    assert says in said.out
    assert "Traceback" not in said.out + said.err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["completed"]
    assert any(says in problem for problem in beside.problems(summary))
    assert len(beside.compared(summary)) == ("point-1" in script)
    assert main(["report", str(tmp_path)]) == 0
    assert says.split(";")[0] in (tmp_path / "report.html").read_text().replace("&#39;", "'")


def test_a_client_that_hangs_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drive, "_SECONDS", 0.2)
    monkeypatch.setattr(drive, "_TIMES", 0)
    assert run(tmp_path, "import time; time.sleep(60)") == 1
    assert "did not end within 0 s and was stopped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["{dir}"], 1, "holds no finished run"),
        (["{dir}", "--tool", "vllm"], 2, "--tool vllm needs --python and --url and --model"),
        (["{dir}", "--tool", "vlm"], 2, "invalid choice"),
        ([], 2, "DIR"),
        (["{dir}", *VLLM, "--api-key-file", "{dir}/key"], 1, "/key: No such"),
    ],
)  # fmt: skip
def test_bad_usage(argv: list[str], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["peer", *(word.replace("{dir}", str(tmp_path)) for word in argv)]) == code
    assert says in capsys.readouterr().err
