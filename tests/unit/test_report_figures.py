"""The plots: what is in them, for any number of points, and the mark on what must not be believed."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from unit.runfolder import good

from pdbench.gate.rundata import Point, load
from pdbench.records import MEASURE, Record
from pdbench.report.figures import FIGURES, Sheet, draw, ecdf, flight, in_flight, latency, throughput, ttft_distribution
from pdbench.report.look import DARK, LIGHT


def xs(ax: Axes, line: int) -> list[float]:
    return [float(x) for x in np.asarray(ax.lines[line].get_xdata())]


def ys(ax: Axes, line: int) -> list[float]:
    return [float(y) for y in np.asarray(ax.lines[line].get_ydata())]


def sheet(folder: Path, stamp: str = "", **options: object) -> Sheet:
    return Sheet(load(good(**options).write(folder)).points, LIGHT, stamp)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _close_figures() -> object:
    yield
    plt.close("all")


def test_throughput_shows_the_figures_of_the_summary(tmp_path: Path) -> None:
    drawn = sheet(tmp_path, concurrency=(16, 4, 8), num_requests=32)
    tokens, requests = throughput(drawn).axes[:2]
    by_load = sorted(drawn.points, key=lambda p: p.summary["concurrency"])
    assert xs(tokens, 0) == [4, 8, 16]
    assert ys(tokens, 0) == [p.summary["output_throughput"] for p in by_load]
    assert ys(requests, 0) == [p.summary["request_throughput"] for p in by_load]
    (per_gpu,) = tokens.child_axes
    assert per_gpu.get_ylabel() == "output tokens/s per GPU (all 4 GPUs)"


def test_latency_has_three_percentiles_in_ms(tmp_path: Path) -> None:
    drawn = sheet(tmp_path, concurrency=(4, 8))
    axes = latency(drawn).axes
    assert [ax.get_ylabel() for ax in axes] == ["ms"] * 3
    assert [line.get_label() for line in axes[0].lines] == ["p50", "p95", "p99"]
    assert ys(axes[0], 2) == [p.summary["ttft_ms"]["p99"] for p in drawn.points]


def test_one_load_point_is_drawn_as_bars(tmp_path: Path) -> None:
    drawn = sheet(tmp_path, concurrency=(4,))
    ax = latency(drawn).axes[0]
    assert not ax.lines
    summary = drawn.points[0].summary["ttft_ms"]
    bars = [bar for bar in ax.patches if isinstance(bar, Rectangle)]
    assert [bar.get_height() for bar in bars] == [summary[q] for q in ("p50", "p95", "p99")]
    assert ax.get_xlabel() == "one load point: concurrency 4"


def test_rates_have_their_own_axis(tmp_path: Path) -> None:
    drawn = sheet(tmp_path, rates=(1.0, 2.0, 16.0))
    ax = throughput(drawn).axes[0]
    assert (ax.get_xlabel(), ax.get_xscale()) == ("requests sent (1/s, configured)", "log")


def test_every_point_has_its_line_in_a_distribution(tmp_path: Path) -> None:
    drawn = sheet(tmp_path, concurrency=(4, 8, 16), num_requests=30)
    figure = ttft_distribution(drawn)
    labels = [line.get_label() for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]
    assert labels == ["concurrency 4 (30 requests)", "concurrency 8 (30 requests)", "concurrency 16 (30 requests)"]


def test_failed_requests_are_in_no_distribution_and_said_in_the_flight(tmp_path: Path) -> None:
    run = good(concurrency=(4,))
    record = run.measured()[2]
    record.ok, record.end_s, record.first_s, record.error = False, math.nan, math.nan, "HTTP 500"
    drawn = Sheet(load(run.write(tmp_path)).points, LIGHT)
    assert ttft_distribution(drawn).axes[0].lines[0].get_label() == "concurrency 4 (23 requests)"
    assert in_flight(drawn).axes[0].get_title() == "concurrency 4\n1 failed ones not shown"


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=3000))
@settings(max_examples=50, deadline=None)
def test_a_thinned_distribution_is_a_part_of_the_whole_one(values: list[float]) -> None:
    """Law: ascending, few points, the extremes stay, and each drawn share is the true share at that value."""
    samples = np.array(values)
    x, share = ecdf(samples)
    assert len(x) <= 600
    assert (x[0], x[-1], share[-1]) == (samples.min(), samples.max(), 1.0)
    assert (np.diff(x) >= 0).all()
    assert (np.diff(share) > 0).all()
    below = np.searchsorted(np.sort(samples), x, side="left") / samples.size
    upto = np.searchsorted(np.sort(samples), x, side="right") / samples.size
    assert ((below < share) & (share <= upto + 1e-12)).all()


def record(sent: float, end: float) -> Record:
    return Record(0, 0, MEASURE, 1, 1, sent, sent, end, end, [end], ok=True)


def test_in_flight_counts_what_was_sent_and_had_not_ended() -> None:
    point = Point(0, {}, {}, [record(10.0, 14.0), record(11.0, 12.0), record(12.0, 13.0)])
    when, count = flight(point)
    # At 2 s one ends and the next is sent: never three at once.
    assert list(zip(when, count, strict=True)) == [(0, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 0)]


@given(st.integers(10, 4000), st.integers(1, 50))
@settings(max_examples=20, deadline=None)
def test_a_thinned_flight_keeps_its_peak_and_its_end(requests: int, slots: int) -> None:
    """One request a second, each of them `slots` seconds long."""
    point = Point(0, {}, {}, [record(float(i), float(i + slots)) for i in range(requests)])
    when, count = flight(point)
    assert len(when) <= 2 * 600 + 2
    assert count.max() == min(slots, requests)
    assert (when[0], count[-1], when[-1]) == (0.0, 0, requests - 1 + slots)


@pytest.mark.parametrize("options", [{"concurrency": (4,), "chunks": 1}, {"rates": tuple(map(float, range(1, 21)))}])
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_one_point_and_twenty(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    (svg,) = draw(name, sheet(tmp_path, num_requests=10, **options), "svg")
    assert b"<svg" in svg


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_a_run_in_which_nothing_succeeded(name: str, tmp_path: Path) -> None:
    run = good(concurrency=(4, 8), num_requests=8)
    for r in run.records:
        r.ok, r.error, r.first_s, r.end_s, r.chunk_s = False, "HTTP 500", math.nan, math.nan, []
    for points in (load(run.write(tmp_path)).points, []):
        (png,) = draw(name, Sheet(points, LIGHT), "png")
        assert png.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", FIGURES)
def test_the_mark_is_on_every_figure(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Figure] = []
    monkeypatch.setattr(plt, "close", kept.append)
    marked = sheet(tmp_path, "INVALID RUN", concurrency=(4, 8))
    draw(name, marked)
    draw(name, Sheet(marked.points, LIGHT))
    monkeypatch.undo()
    assert [[text.get_text() for text in figure.texts] for figure in kept] == [["INVALID RUN"], []]


def test_the_same_run_gives_the_same_picture(tmp_path: Path) -> None:
    drawn = sheet(tmp_path, concurrency=(4, 8))
    assert draw("latency", drawn, "svg") == draw("latency", drawn, "svg")


def test_names_from_outside_are_no_formulas(tmp_path: Path) -> None:
    """A dollar sign in a text is a dollar sign, not the begin of a formula that fails to parse."""
    drawn = sheet(tmp_path, concurrency=(4,))
    marked = Sheet(drawn.points, LIGHT, "", "model $\\frac{")
    assert draw("throughput", marked, "svg")[0].startswith(b"<?xml")


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_lines_and_letters_stand_out_from_the_paper(theme: object) -> None:
    """Contrast as WCAG 2.2 defines it: 4.5 for text, and at least 2 for lines, which are dashed and marked as well."""
    assert isinstance(theme, type(LIGHT))

    def contrast(colour: str) -> float:
        light, dark = sorted((_luminance(colour), _luminance(theme.paper)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    assert all(re.fullmatch("#[0-9A-Fa-f]{6}", colour) for colour in theme.lines)
    assert contrast(theme.ink) >= 4.5
    assert [colour for colour in theme.lines if contrast(colour) < 2.0] == []
