"""Bad usage: one clear message, exit code 2, nothing sent and nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdbench.cli import main

GOOD = {
    "--url": "http://127.0.0.1:9",
    "--model": "m",
    "--concurrency": "2",
    "--num-requests": "4",
    "--isl": "8",
    "--osl": "4",
}
TRACE = str(Path(__file__).resolve().parents[1] / "data" / "mooncake_excerpt.jsonl")


def run(folder: Path, changes: dict[str, str | None]) -> int:
    options = {**GOOD, "--output": str(folder / "out"), **changes}
    argv = [word for option, value in options.items() if value is not None for word in (option, value)]
    try:
        return main(["run", *argv])
    except SystemExit as end:  # argparse's own refusals
        return int(end.code or 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--url": None}, "--url is missing"),
        ({"--url": "127.0.0.1:8000"}, "write scheme, host and port"),
        ({"--url": "http://127.0.0.1:99999"}, "write scheme, host and port"),
        ({"--url": "http://127.0.0.1:9/generate"}, "write scheme, host and port"),
        ({"--model": None}, "--model NAME is missing"),
        ({"--output": None}, "--output DIR is missing"),
        ({"--concurrency": None}, "say how much load"),
        ({"--concurrency": "0"}, "whole numbers from 1 up"),
        ({"--concurrency": "4,x"}, "whole numbers from 1 up"),
        ({"--concurrency": "4,"}, "whole numbers from 1 up"),
        ({"--request-rate": "0", "--concurrency": None}, "numbers above 0"),
        ({"--request-rate": "nan", "--concurrency": None}, "numbers above 0"),
        ({"--arrival": "constant"}, "--arrival goes with --request-rate"),
        ({"--arrival": "gauss", "--request-rate": "2", "--concurrency": None}, "'gauss' is no arrival process"),
        ({"--request-rate": "2"}, "--concurrency and --request-rate are ways to say how much load; give one"),
        ({"--batch": "2", "--concurrency": None}, "--num-requests goes with --concurrency"),
        ({"--duration": "2"}, "--duration goes with --request-rate or --time-scale"),
        ({"--duration": "2", "--request-rate": "2", "--concurrency": None}, "--num-requests and --duration both"),
        ({"--prefix-len": "0"}, "--prefix-len must be at least 1"),
        ({"--load": "/nonexistent"}, "cannot read --load"),
        ({"--dataset": "/nonexistent", "--isl": None}, "cannot read the dataset"),
        ({"--tokenizer": "/nonexistent"}, "give the model's folder"),
        ({"--num-requests": None}, "--num-requests N is missing"),
        ({"--num-requests": "0"}, "--num-requests must be at least 1"),
        ({"--num-requests": "many"}, "invalid int value: 'many'"),
        ({"--isl": None}, "--isl is missing"),
        ({"--isl": "0"}, "--isl: '0' is no length"),
        ({"--osl": "9-3"}, "--osl: '9-3' is no length"),
        ({"--warmup": "-1"}, "--warmup must be at least 0"),
        ({"--timeout": "0"}, "--timeout must be above 0"),
        ({"--slo-ttft-ms": "0"}, "--slo-ttft-ms must be above 0"),
        ({"--api": "chat", "--prompt": "tokens"}, "chat takes text"),
        ({"--token-ids": "5"}, "is no range of token ids"),
        ({"--time-scale": "1"}, "--time-scale goes with --trace"),
        ({"--max-isl": "0"}, "--max-isl must be at least 1"),
        ({"--trace": TRACE}, "--isl does not go with --trace"),
        ({"--trace": TRACE, "--isl": None, "--osl": None, "--num-requests": "201"}, "holds 200 requests"),
        ({"--trace": TRACE, "--isl": None, "--osl": None, "--time-scale": "1"}, "--concurrency and --time-scale are ways"),
        ({"--trace": "/nonexistent", "--isl": None, "--osl": None}, "cannot read the trace"),
        ({"--api-key-file": "/nonexistent"}, "cannot read --api-key-file"),
        ({"--admin-api-key-file": "/nonexistent"}, "cannot read --admin-api-key-file"),
        ({"--ca-file": "/etc/passwd"}, "--ca-file goes with an https URL, and --url is http://"),
        ({"--url": "https://127.0.0.1:1", "--ca-file": "/nonexistent"}, "--ca-file /nonexistent: No such file"),
        ({"--url": "https://127.0.0.1:1", "--ca-file": "/etc/passwd"}, "--ca-file /etc/passwd: it holds no certificate in PEM"),
        ({"--plan": "/nonexistent"}, "cannot read the plan"),
        ({"--concurency": "3"}, "unrecognized arguments"),
    ],
)
def test_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str | None], expected: str) -> None:
    assert run(tmp_path, changes) == 2
    said = capsys.readouterr()
    assert expected in said.err
    assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("{}")
    assert run(tmp_path, {}) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_key_file_with_more_than_a_key_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("one two\n")
    assert run(tmp_path, {"--api-key-file": str(tmp_path / "key")}) == 2
    said = capsys.readouterr().err
    assert "must hold one key" in said
    assert "one two" not in said


@pytest.mark.parametrize("name", ["requests.jsonl", None])
def test_nothing_to_recover_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str | None) -> None:
    if name:
        (tmp_path / name).touch()
    assert main(["run", "--recover", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "recover" in said
    assert "Traceback" not in said


def test_no_server_is_could_not_measure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, {}) == 1
    said = capfd.readouterr().err
    assert "did not answer the first request: not connected" in said
    assert "Traceback" not in said


def test_a_reader_that_has_seen_enough_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "pdbench", "--help"], stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("option", ["--recover", "--share", "--meet", "--meet-key"])
def test_a_profile_takes_no_option_that_does_nothing_there(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", option, "x"]) == 2
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err
