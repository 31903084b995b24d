"""`pdbench fit` on the model's own figures: it finds what was hidden, and says what it cannot know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pdbench.fit import cli
from pdbench.fit.cases import Case, simulate
from pdbench.fit.solve import fit, values_of, with_values
from pdbench.load.errors import LoadError
from pdbench.model.profile import Profile, load, parse

HIDDEN = {"compute_efficiency": 0.5, "bandwidth_efficiency": 0.6, "decode_us_per_request": 20.0, "frontend_us_per_token": 40.0}


def one_by_one(asked: Sequence[tuple[Profile, Case]]) -> Sequence[Mapping[str, float]]:
    return [simulate(profile, case) for profile, case in asked]


def case(prefill: int, decode: int, aggregated: int, isl: int, osl: int, concurrency: int) -> Case:
    ratio = f"{aggregated}agg" if aggregated else f"{prefill}p{decode}d"
    return Case(
        name=f"{ratio} {isl}/{osl} c={concurrency}",
        ratio=ratio,
        prefill=prefill,
        decode=decode,
        aggregated=aggregated,
        tp_size=1,
        transport="cuda_ipc",
        requests=((isl, osl),) * 36,
        concurrency=concurrency,
        due=(),
        capacity=0,
        max_running=0,
        prefix_cache=False,
        measured={},
    )


@pytest.fixture(scope="module")
def truth() -> tuple[Profile, Profile, list[Case]]:
    """The start, a profile that is hidden, and what was measured of the hidden one."""
    base = load("h200-qwen2.5-3b")
    hidden = with_values(base, {**values_of(base, "cuda_ipc"), **HIDDEN}, "cuda_ipc")
    asked = [case(1, 1, 0, isl, osl, c) for isl, osl, c in ((2048, 16, 12), (256, 24, 36), (1024, 24, 4))]
    asked.append(case(0, 0, 1, 1024, 16, 12))
    return base, hidden, [replace(one, measured=simulate(hidden, one)) for one in asked]


def test_a_hidden_profile_is_found(truth: tuple[Profile, Profile, list[Case]]) -> None:
    base, _, cases = truth
    before = max(abs(simulate(base, one)["e2e_ms"] / one.measured["e2e_ms"] - 1) for one in cases)
    found = fit(base, cases, one_by_one)
    after = [abs(simulate(found.profile, one)[name] / one.measured[name] - 1) for one in cases for name in one.measured]
    assert before > 0.2
    assert max(after) < 0.05
    # Four load points know the prefill's speed well.
    assert found.known["compute_efficiency"]
    assert found.values["compute_efficiency"] == pytest.approx(HIDDEN["compute_efficiency"], rel=0.1)


def test_what_the_runs_do_not_show_stays_and_is_said(truth: tuple[Profile, Profile, list[Case]]) -> None:
    base, _, cases = truth
    # One aggregated server moves no KV cache.
    found = fit(base, cases[3:], one_by_one)
    assert not found.known["latency_ms"]
    assert found.values["latency_ms"] == pytest.approx(values_of(base, "cuda_ipc")["latency_ms"], rel=1e-6)
    text = cli.written(base, found, cases[3:], [])
    again = parse(text, "fitted", "fitted")
    assert again.transports["cuda_ipc"].latency_ms == pytest.approx(found.profile.transports["cuda_ipc"].latency_ms, rel=1e-3)
    assert again.sources["transports.cuda_ipc.latency_ms"].startswith("derived: fitted with others")
    assert again.sources["engine.compute_efficiency"].startswith("measured: fitted to 1 load points")
    assert again.sources["gpu.tflops"] == base.sources["gpu.tflops"]
    assert "these runs hardly say" in cli.table(base, found, cases[3:])


def test_runs_that_were_kept_out_are_told_apart(truth: tuple[Profile, Profile, list[Case]]) -> None:
    _, hidden, cases = truth
    text = cli.errors(hidden, cases[:3], cases[3:], one_by_one)
    assert "* 1agg 1024/16 c=12" in text
    # The truth itself is off by nothing.
    assert text.splitlines()[-1].split("kept out")[1].split() == ["0.0%"] * 4


def test_without_load_points_there_is_no_fit() -> None:
    with pytest.raises(ValueError, match="no load point"):
        fit(load("tiny"), [], one_by_one)


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(LoadError, match="neither a run's folder"):
        cli.runs(tmp_path)
    assert cli.main([str(tmp_path), "--base", "tiny"]) == 1
    assert cli.main([str(tmp_path), "--base", "tinny"]) == 2
    assert "did you mean tiny?" in capsys.readouterr().err


def test_the_latency_that_is_fitted_is_of_the_way_that_caches_went_whatever_comes_first(
    truth: tuple[Profile, Profile, list[Case]],
) -> None:
    base, _, cases = truth
    moved = replace(case(1, 1, 0, 64, 8, 1), transport="tcp")
    hidden = with_values(base, {**values_of(base, "tcp"), "latency_ms": 40.0}, "tcp")
    told = [replace(one, measured=simulate(hidden, one)) for one in (cases[3], moved)]
    assert fit(base, told, one_by_one).profile.transports["tcp"].latency_ms > 3 * base.transports["tcp"].latency_ms


def test_a_published_table_is_fitted_to_as_its_runs_are() -> None:
    found = cli.load_points(Path(__file__).resolve().parents[2] / "docs/results/h200/h200x2-qwen.csv")
    assert len(found) == 18
    one = next(case for case in found if case.name == "1p1d 512/128 c=32")
    assert (one.prefill, one.decode, one.aggregated, one.tp_size, one.transport) == (1, 1, 0, 1, "cuda_ipc")
    assert one.requests == ((512, 128),) * 300
    assert one.measured["ttft_ms"] == 148.2422
    assert len(cli.load_points(Path(__file__).resolve().parents[2] / "docs/results/h200/h200x2-goodput.csv")) == 24


def test_a_table_that_says_too_little_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("ratio,isl\n1p1d,512\n")
    with pytest.raises(LoadError, match="is no table of a sweep that can be read"):
        cli.load_points(tmp_path / "t.csv")
