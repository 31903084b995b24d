"""The search for the goodput: on clusters whose goodput is known, and its command line around a stand-in for `pdbench run`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdbench.cli import main
from pdbench.metrics import Slo, goodput
from pdbench.records import Record
from pdbench.search.goodput import Counts, Step, answer, search, try_rate
from pdbench.steady import saturation


class Cluster:
    """Requests meet their limits with a probability that falls with the rate: 90 % of them at ``goodput``."""

    def __init__(self, goodput: float, requests: int = 400, seed: int = 0) -> None:
        self.goodput, self.requests, self.rng = goodput, requests, np.random.default_rng(seed)
        self.asked: list[float] = []

    def share(self, rate: float) -> float:
        return float(1 / (1 + (1 / 9) * (rate / self.goodput) ** 12))

    def measure(self, rate: float, number: int) -> Counts:
        self.asked.append(rate)
        return Counts(int(self.rng.binomial(self.requests, self.share(rate))), self.requests)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 500), st.floats(0.5, 20), st.integers(0, 10**6))
def test_the_goodput_is_found_from_below_and_from_above(goodput: float, start: float, seed: int) -> None:
    cluster = Cluster(goodput, seed=seed)
    found = search(cluster.measure, start)
    assert found.rate is not None
    assert found.above is not None
    assert found.rate < found.above <= 1.051 * found.rate
    # a share within 2 points of 90 % cannot be told from it with 1,200 requests
    assert cluster.share(found.rate) > 0.86
    assert cluster.share(found.above) < 0.94


def test_no_rate_above_the_highest_is_tried() -> None:
    cluster = Cluster(1000)
    found = search(cluster.measure, 4, highest=20)
    assert (found.rate, found.above) == (20, None)
    assert cluster.asked == [4, 8, 16, 20]


def test_limits_out_of_reach_end_the_search() -> None:
    found = search(lambda rate, number: Counts(0, 100), 8)
    assert found.rate is None
    assert len(found.steps) == 13


def test_a_share_that_is_not_decided_is_measured_again() -> None:
    assert [answer(Counts(good, 100), 0.9) for good in (99, 90, 70)] == ["met", "open", "missed"]
    answers = iter([Counts(356, 400), Counts(351, 400), Counts(351, 400)])
    step = try_rate(lambda rate, number: next(answers), 2.0, 0.9, 5)
    assert step == Step(2.0, Counts(1058, 1200, independent=1200), 3, False, False)
    close = try_rate(lambda rate, number: Counts(91, 100), 2.0, 0.9, 3)
    assert (close.met, close.close, close.counts) == (True, True, Counts(273, 300, independent=300))


def test_requests_count_for_what_they_are_worth() -> None:
    assert answer(Counts(99, 100, independent=10.0), 0.9) == "open"
    # runs that are far apart: three do not say where their mean lies
    answers = iter([Counts(360, 400), Counts(370, 400), Counts(270, 400)])
    step = try_rate(lambda rate, number: next(answers), 2.0, 0.9, 3)
    assert (step.runs, step.met, step.close) == (3, False, True)
    assert step.counts.worth < 10


class Fifo:
    """One server that answers 10 requests/s, first come first served; tokens come in time: a limit of TPOT bounds nothing."""

    def __init__(self, requests: int) -> None:
        self.requests = requests

    def summary(self, rate: float, seed: int) -> dict[str, Any]:
        rng, now, free, records = np.random.default_rng(seed), 0.0, 0.0, []
        for i in range(self.requests):
            now += rng.exponential(1 / rate)
            free = max(now, free) + 0.1
            times = [free - 0.02, free - 0.01, free]
            records.append(
                Record(0, i, "measure", 9, 3, now, now, times[0], free, times, [1, 1, 1], 9, 3, 0, 200, "length", True)
            )
        found = {"goodput": goodput(records, Slo(tpot_ms=50), 1.0), "saturation": saturation(records)}
        return {"failed": 0, "invalid_reasons": [], "gpus": 1, **found}


@pytest.mark.parametrize(("requests", "start"), [(80, 2.0), (300, 100.0), (300, 3.0)])
def test_no_share_makes_more_than_the_servers_can_do(
    requests: int, start: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = Fifo(requests)
    Runs(monkeypatch, made=fifo.summary)
    ask = ["search", "goodput", "--start", str(start), "--output", str(tmp_path / "s"), *RUN]
    assert main(ask) == 0
    assert 8 <= json.loads((tmp_path / "s" / "goodput.json").read_text())["goodput"] <= 12


def test_a_backlog_that_grows_misses_whatever_the_share() -> None:
    assert answer(Counts(100, 100, oversaturated=True), 0.9) == "missed"


# -- the command line


class Runs:
    """Stands for `pdbench run`: writes the summary that a cluster with a goodput of 10/s would give."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
        self.commands: list[list[str]] = []
        self.more = more
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        option = dict(zip(command[4::2], command[5::2], strict=True))
        rate, folder = float(option["--request-rate"]), Path(option["--output"])
        code = int(self.more.get("code", 0))
        if code in (0, 3):
            folder.mkdir()
            if "made" in self.more:
                (folder / "summary.json").write_text(json.dumps(self.more["made"](rate, int(option["--seed"]))))
                return subprocess.CompletedProcess(command, code)
            good = round(400 * Cluster(10).share(rate))
            found = {
                **{"failed": 0, "invalid_reasons": [], "gpus": 4, "goodput": {"good": good, "sent": 400}},
                **{"saturation": {"oversaturated": False}, **self.more},
            }
            (folder / "summary.json").write_text(json.dumps(found))
        return subprocess.CompletedProcess(command, code)


RUN = ["--", "--url", "http://127.0.0.1:1", "--slo-ttft-ms", "500"]


def test_runs_stand_in_folders_and_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(monkeypatch)
    ask = ["search", "goodput", "--start", "3", "--output", str(tmp_path / "s"), *RUN]
    assert main(ask) == 0
    result = json.loads((tmp_path / "s" / "goodput.json").read_text())
    assert 9 <= result["goodput"] <= 10.5
    assert result["goodput_per_gpu"] == result["goodput"] / 4
    assert result["missed_at"] <= 1.05 * result["goodput"] + 1e-9
    assert result["complete"]
    counts = result["steps"][0]["counts"]
    assert counts == {"good": 400, "sent": 400, "oversaturated": False, "independent": 400, "unjudged": ""}
    assert "requests/s, " in capsys.readouterr().out
    seeds = [command[command.index("--seed") + 1] for command in runs.commands]
    assert len(set(seeds)) == len(seeds)  # no prompt is sent twice
    first = len(runs.commands)
    assert main(ask) == 0
    assert len(runs.commands) == first
    assert json.loads((tmp_path / "s" / "goodput.json").read_text()) == result
    # a run that was broken off is measured again, and what it left is kept
    (tmp_path / "s" / "rate-6-0" / "summary.json").unlink()
    assert main(ask) == 0
    assert len(runs.commands) == first + 1
    assert (tmp_path / "s" / "rate-6-0.broken-1").is_dir()
    assert main([*ask, "--isl", "7"]) == 2
    assert "search with other options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        ({"invalid_reasons": ["the client did not keep up: 5 ms"]}, 3, "cannot be believed: the client did not keep up"),
        ({"goodput": None}, 3, "has no goodput"),
        ({"code": 1}, 1, "ended with exit code 1"),
        ({"code": -9}, 1, "ended with exit code -9"),
        ({"goodput": {"good": 0, "sent": 400}}, 1, "limits out of reach"),
    ],
)
def test_what_cannot_be_believed_ends_the_search(
    more: dict[str, Any],
    code: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Runs(monkeypatch, **more)
    assert main(["search", "goodput", "--output", str(tmp_path / "s"), *RUN]) == code
    assert says in capsys.readouterr().err


def test_failed_requests_only_miss_their_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Runs(monkeypatch, failed=3, invalid_reasons=["3 of 400 requests failed, 3 of them with: HTTP 503"])
    assert main(["search", "goodput", "--output", str(tmp_path / "s"), *RUN]) == 0


def test_a_client_that_gives_out_bounds_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(rate: float, seed: int) -> dict[str, Any]:
        faults = ["the client did not keep up: 5 ms"] if rate > 30 else []
        counts = {"goodput": {"good": 400, "sent": 400}, "saturation": {"oversaturated": False}}
        return {"failed": 0, "invalid_reasons": faults, "gpus": 4, **counts}

    Runs(monkeypatch, made=made)
    assert main(["search", "goodput", "--output", str(tmp_path / "s"), *RUN]) == 0
    found = json.loads((tmp_path / "s" / "goodput.json").read_text())
    assert 28 < found["goodput"] <= 30 < found["missed_at"]
    assert "cannot be judged: the client did not keep up: 5 ms" in capsys.readouterr().out


def test_what_is_known_is_written_and_a_run_that_cannot_be_believed_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = {4.0: ["stopped: by a signal"]}

    def made(rate: float, seed: int) -> dict[str, Any]:
        good = round(400 * Cluster(10).share(rate))
        counts = {"goodput": {"good": good, "sent": 400}, "saturation": {"oversaturated": False}}
        return {"failed": 0, "invalid_reasons": faults.get(rate, []), "gpus": 4, **counts}

    runs = Runs(monkeypatch, made=made)
    ask = ["search", "goodput", "--output", str(tmp_path / "s"), *RUN]
    assert main(ask) == 3
    found = json.loads((tmp_path / "s" / "goodput.json").read_text())
    assert (found["complete"], found["goodput"], found["missed_at"]) == (False, 2, None)
    assert "so far: 2 requests/s" in capsys.readouterr().out
    before = len(runs.commands)
    faults.clear()
    assert main(ask) == 0
    assert (tmp_path / "s" / "rate-4-0.broken-1").is_dir()
    assert "--request-rate 4 " in " ".join(runs.commands[before])
    found = json.loads((tmp_path / "s" / "goodput.json").read_text())
    assert found["complete"]
    assert 9 <= found["goodput"] <= 10.5


def test_a_dry_run_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(monkeypatch)
    assert main(["search", "goodput", "--start", "3", "--output", str(tmp_path / "s"), "--dry-run", *RUN]) == 0
    out = capsys.readouterr().out
    assert "run --url http://127.0.0.1:1 --slo-ttft-ms 500 --request-rate 3 --seed" in out
    assert not runs.commands
    assert not (tmp_path / "s").exists()


def test_an_emulated_engine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Runs(monkeypatch)
    plan = tmp_path / "plan.json"
    plan.write_text('{"emulated": true}')
    assert main(["search", "goodput", "--output", str(tmp_path / "s"), *RUN, "--plan", str(plan)]) == 0
    assert "the engine was emulated: this says nothing about hardware" in capsys.readouterr().out
    assert json.loads((tmp_path / "s" / "goodput.json").read_text())["no_gpu"] == "the engine was emulated"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["goodput"], "--output"),
        (["goodput", "--output", "{}"], "no limit is set"),
        (["goodput", "--output", "{}", *RUN, "--seed", "3"], "--seed: the search sets this itself"),
        (["goodput", "--output", "{}", *RUN, "--request-rate=3"], "--request-rate: the search sets"),
        (["goodput", "--output", "{}", "--share", "1", *RUN], "--share 1: write a number above 0 and below 1"),
        (["goodput", "--output", "{}", "--start", "-2", *RUN], "--start -2: write a number above 0"),
        (["goodput", "--output", "{}", "--repeats", "0", *RUN], "--repeats 0"),
        (
            ["goodput", "--output", "{}", *RUN, "--num-requests", "80"],
            "--num-requests 80: whether a backlog grows cannot be told",
        ),
        (["goodput", "--output", "{}", *RUN, "--num-requests=99"], "with fewer than 100"),
        (["latency", "--output", "{}"], "invalid choice"),
    ],
)
def test_bad_usage(args: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", *(arg.format(tmp_path / "s") for arg in args)]) == 2
    assert says in capsys.readouterr().err
