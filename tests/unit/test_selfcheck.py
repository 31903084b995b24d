"""Judging a client beside a server whose times are known."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.cli import main
from pdbench.selfcheck.judge import Answer, Asked, Finding, judge, shape, worst
from pdbench.selfcheck.truth import answer_text

CLIENT: dict[str, object] = {"cpu_s": 0.6, "busy": 0.2}


def row(number: int, read_s: float, tokens: int = 11, ttft_s: float = 0.05, itl_s: float = 0.01) -> tuple[int, ...]:
    first = read_s + ttft_s
    return (number, *(int(1e9 * t) for t in (read_s, first, first + (tokens - 1) * itl_s)), tokens, 0, 0, 0)


def answer(number: int, sent_s: float, late_s: float = 0.0, stretch: float = 1.0, tokens: int = 11) -> Answer:
    text = hashlib.sha256(answer_text(number, tokens).encode()).hexdigest()
    first = sent_s + 0.05 + late_s
    return Answer(True, sent_s, first, first + (tokens - 1) * 0.01 * stretch, text)


def judged(late_s: float = 0.0, stretch: float = 1.0, pause_s: float = 0.0, server_late_s: float = 0.0) -> Finding:
    """Two slots, three rounds of 0.15 s; server and client count from other zeros."""
    asked = Asked(2, 3, 11, 10.0)
    starts = [i // 2 * (0.15 + pause_s + server_late_s) for i in range(6)]
    log = [row(100 + i, 7.0 + start, ttft_s=0.05 + server_late_s) for i, start in enumerate(starts)]
    answers = [answer(100 + i, start, late_s + server_late_s, stretch) for i, start in enumerate(starts)]
    return judge(asked, answers, log, CLIENT)


def test_a_client_that_is_right() -> None:
    found = judged()
    assert (found.grade, found.reasons, found.requests) == ("A", [], 6)
    assert found.ttft_wrong_by["p99"] == pytest.approx(0, abs=1e-6)
    assert found.delivered == pytest.approx(1)
    assert found.tokens_per_s == pytest.approx(66 / 0.45)
    assert found.client_cores == pytest.approx(0.6 / 0.45)
    assert found.most_tokens_per_s == pytest.approx(66 / 0.45 / 0.2)


@given(st.floats(0, 0.4))
def test_the_servers_own_lateness_is_not_the_clients(late_s: float) -> None:
    found = judged(server_late_s=late_s)
    assert found.grade == "A"
    assert found.ttft_wrong_by["mean"] == pytest.approx(0, abs=1e-4)
    assert found.true_ttft_ms["mean"] == pytest.approx(50 + 1000 * late_s, abs=1e-3)


@pytest.mark.parametrize(
    ("spoilt", "grade", "says"),
    [
        ({"late_s": 0.005}, "B", ""),
        ({"late_s": 0.02}, "C", ""),
        ({"late_s": 0.06}, "F", "its mean TTFT is wrong by 60.0 ms (most: 50)"),
        ({"stretch": 1.03}, "B", ""),
        ({"stretch": 1.3}, "F", "its ITL is wrong by 3.00 ms (most: 2)"),
        ({"pause_s": 0.05}, "F", "it delivered 82% of the load (least: 90%)"),
    ],
)
def test_a_client_that_is_wrong(spoilt: dict[str, float], grade: str, says: str) -> None:
    found = judged(**spoilt)
    assert (found.grade, says in " ".join(found.reasons)) == (grade, True)
    if spoilt.get("late_s"):
        assert found.trusted_from_ms["mean"] == pytest.approx(10_000 * spoilt["late_s"])


def test_what_is_missing_failed_or_garbled_is_no_good_client() -> None:
    log = [row(i, 0.0) for i in range(3)]
    lost = judge(Asked(3, 1, 11, 10.0), [answer(0, 0), answer(1, 0)], log, CLIENT)
    assert (lost.grade, lost.reasons) == ("F", ["2 of 3 requests are accounted for"])
    bad = Answer(False, 0.0, float("nan"), float("nan"), "")
    odd = Answer(True, 0.0, 0.05, 0.15, "0" * 64)
    both = judge(Asked(3, 1, 11, 10.0), [answer(0, 0), bad, odd], log, {})
    assert both.reasons == ["1 of 3 requests failed", "1 of 3 answers were recorded with another text than was sent"]
    assert both.most_tokens_per_s is None
    none = judge(Asked(1, 1, 11, 10.0), [bad], [], {})
    assert (none.grade, none.delivered, none.trusted_from_ms) == ("F", 0.0, {})
    assert json.dumps(none.to_json(), allow_nan=False)


def test_the_network_is_none_of_the_clients_doing() -> None:
    found = judge(Asked(1, 1, 11, 10.0), [answer(0, 0, late_s=0.004)], [row(0, 0)], CLIENT, path_ms=4.0)
    assert found.ttft_wrong_by["mean"] == pytest.approx(0, abs=1e-6)


@given(st.integers(1, 10_000), st.integers(1, 5000), st.floats(0.5, 20))
def test_the_short_form_is_short_and_never_more_than_the_server_can_send(concurrency: int, tokens: int, seconds: float) -> None:
    asked = shape(concurrency, tokens, 50.0, 20.0, 25_000.0, seconds)
    assert asked.itl_ms >= 20
    assert concurrency / asked.itl_ms * 1000 <= 25_000.001
    assert asked.tokens <= tokens
    assert asked.rounds >= 2
    if asked.tokens > 8 or asked.rounds > 2:
        assert asked.rounds * (50 + asked.tokens * asked.itl_ms) <= 1000 * seconds + 0.001
    whole = shape(concurrency, tokens, 50.0, 20.0, 25_000.0, None)
    assert (whole.tokens, whole.itl_ms) == (tokens, asked.itl_ms)
    assert whole.rounds >= 3


def test_grades_are_ordered() -> None:
    assert [worst(["A"]), worst(["A", "C", "B"]), worst(["A", "F"]), worst([])] == ["A", "C", "F", "F"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--concurrency", "0"], "'0' is not a whole number from 1 up"),
        (["--concurrency", "8,x"], "'x' is not a whole number"),
        (["--itl-ms", "nan"], "'nan' is not a number above 0"),
        (["--against", "router:80"], "write http, host and port"),
        (["--listen", "127.0.0.1:70000"], "is no address and port of this host"),
        (["--listen", "9000"], "is no address and port of this host"),
        (["--listen", "127.0.0.1:9000", "--against", "http://127.0.0.1:9000"], "not allowed with"),
    ],
)
def test_bad_options_are_refused(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selfcheck", *options]) == 2
    assert says in capsys.readouterr().err


def test_what_answers_must_be_a_truth_server(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["selfcheck", "--against", "http://127.0.0.1:9", "--json", str(tmp_path / "s.json")]) == 1
    assert "http://127.0.0.1:9 does not answer as a truth server" in capsys.readouterr().err
    assert "does not answer" in json.loads((tmp_path / "s.json").read_text())["error"]
