"""What a sweep shows while it runs, and how long it says that it will take."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pdbench.sweep import estimate
from pdbench.sweep.drive import Ended
from pdbench.sweep.grid import Cell
from pdbench.sweep.journal import Journal
from pdbench.sweep.order import Cost
from pdbench.sweep.progress import Progress
from pdbench.sweep.table import load_words, results
from pdlib import settings


def cell(name: str) -> Cell:
    return Cell(name, {}, {"ratio": name}, {}, "inventory/x")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress(out: io.StringIO, now: list[float]) -> Progress:
    left = [("a", 1), ("b", 1), ("b", 2), ("a", 2)]
    remaining = estimate.Remaining({"a": 100.0, "b": 50.0}, {("a", 1): 20.0, ("b", 1): 20.0, ("a", 2): 20.0})
    return Progress(left, 6, remaining, out, lambda: now[0])


def play(view: Progress, now: list[float], verb: str, name: str, repeat: int, seconds: float, ended: Ended | None = None) -> None:
    view.doing(verb, cell(name), repeat, 1)
    now[0] += seconds
    view.done(verb, cell(name), repeat, seconds, ended or Ended())


def test_plain_lines_say_what_is_done_and_what_is_left_by_what_was_measured() -> None:
    out, now = io.StringIO(), [0.0]
    view = progress(out, now)
    play(view, now, "deploy", "a", 1, 500.0)
    play(view, now, "bench", "a", 1, 400.0)
    play(view, now, "deploy", "b", 1, 10.0)
    lines = out.getvalue().splitlines()
    assert lines[0] == "[2/6  6 min 0 s left]  deploy a (round 1)"
    # the first of each may install, so it teaches nothing
    assert lines[3] == "[3/6  4 min 0 s left]  bench a (round 1): valid, 6 min 40 s"
    assert lines[5] == "[3/6  3 min 30 s left]  deploy b (round 1): up, 10 s"
    play(view, now, "bench", "b", 1, 25.0)
    # b: 25 s again; a: half of what was assumed, and so is its deploy
    assert out.getvalue().splitlines()[-1] == "[4/6  85 s left]  bench b (round 1): valid, 25 s"
    view.doing("bench", cell("b"), 2, 1)
    play(view, now, "bench", "b", 2, 30.0, Ended("invalid", "too slow"))
    assert out.getvalue().splitlines()[-1].endswith("bench b (round 2): INVALID: too slow, 30 s")
    now[0] += 61
    view.tick("120 of 200")
    assert out.getvalue().splitlines()[-1].endswith("bench b (round 2): 120 of 200")
    assert "\033" not in out.getvalue()


def test_a_terminal_has_one_line_that_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    out, now = Terminal(), [0.0]
    view = progress(out, now)
    view.doing("bench", cell("a"), 1, 2)
    for _ in range(3):
        now[0] += 1
        view.tick("a very long line of the play that no terminal of that width has room for")
    assert "\n" not in out.getvalue()
    shown = out.getvalue().split("\r\033[K")
    assert len(shown) == 5
    assert all(len(line) < 90 for line in shown)
    assert "bench a (round 1, attempt 2)" in shown[1]


def test_loads_take_longer_with_more_tokens_and_deploys_that_start_nothing_are_short() -> None:
    def load(**given: object) -> float:
        return estimate.load_s(settings.cluster_settings({"h": settings.host_settings("h", given, {})}))

    assert load(bench_output_len=256) > load(bench_output_len=128) > load(bench_output_len=128, bench_concurrency=[64])
    assert load(bench_concurrency=[32, 32]) - load(bench_concurrency=[32]) == pytest.approx(
        load(bench_concurrency=[32]) - estimate.BENCH_S
    )
    assert load(bench_request_rate=[4], bench_num_requests=200) == estimate.BENCH_S + 50
    assert estimate.deploy_s(Cost(), False) == 0
    assert estimate.deploy_s(Cost(deploys=1), False) == estimate.DEPLOY_S
    assert estimate.deploy_s(Cost(3, 1, 1, 1), False) > estimate.deploy_s(Cost(3, 1, 0, 1), False)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"bench_concurrency": [1, 4]}, "512/64 x 1,4"),
        ({"bench_batch": [8, 32]}, "512/64 x 8 at once,32 at once"),
        ({"bench_request_rate": [0.5, 4.0]}, "512/64 at 0.5,4/s"),
        ({"bench_trace": "traces/t.jsonl", "bench_time_scale": 0.25}, "t.jsonl at its own times x 0.25"),
        ({"bench_load": {"stages": [{"concurrency": 8}, {"request_rate": 2}], "isl": 99}}, "99/64 x 8,2/s"),
    ],
)
def test_a_load_is_told_as_it_is_paced(said: dict[str, object], words: str) -> None:
    lengths = {"bench_input_len": "512", "bench_output_len": "64", "bench_num_requests": 100}
    assert load_words({**settings.cluster_settings({"h": settings.host_settings("h", {}, {})}), **lengths, **said}) == words


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ({"concurrency": 32}, "32 in flight"),
        ({"concurrency": 32, "batch": True}, "32 at once"),
        ({"request_rate": 2.0, "request_rate_to": 6.0}, "2-6/s"),
        ({"time_scale": 0.25}, "its own times x 0.25"),
        ({}, "point 0"),
    ],
)
def test_what_was_measured_is_told_by_its_own_pace(tmp_path: Path, point: dict[str, object], said: str) -> None:
    """The variables of the run may say another: bench_concurrency has a value whatever else is given."""
    run = tmp_path / "runs/a/r1a1"
    run.mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps({"points": [{**point, "output_throughput": 8.0}]}))
    (run / "plan.json").write_text(json.dumps({"ratio": "1p1d", "workers": []}))
    (run / "manifest.json").write_text(json.dumps({"bench_concurrency": [4]}))
    journal = Journal(tmp_path)
    journal.write("finished", cell="a", repeat=1, attempt=1, run="runs/a/r1a1")
    text, good = results(tmp_path, [cell("a")], 1, journal)
    assert good
    assert said in text
