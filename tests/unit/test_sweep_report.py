"""The report of a sweep: frontier, decisions, grades and words by their laws, figures against their table."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pdbench.compare.judge import Run
from pdbench.records import Record
from pdbench.report.look import LIGHT, Theme
from pdbench.sweep.report import answer, heat, inside, lines
from pdbench.sweep.report.choose import Decision, decisions, frontier, interval
from pdbench.sweep.report.data import GOODPUT, RATE, Cell, Table, table
from pdbench.sweep.report.read import Sweep
from pdbench.sweep.trust import NARROW, REQUESTS, RULES, Facts, grade

Row = dict[str, Any]


def row(ratio: str, rate: float, repeat: int = 1, **other: object) -> Row:
    """A row of the tidy table, as far as the report looks at it."""
    return {
        **{"cell": ratio, "repeat": repeat, "attempt": 1, "run": "", "point": 0, "ratio": ratio, "gpus": 4, "engine": "sglang"},
        **{"engine_version": "0.5.23", "model": "m", "transfer_backend": None, "router": "sglang-router", "seed": 1},
        **{"router_policy": "round_robin", "concurrency": 8, "request_rate": None, "isl": 512.0, "osl": 64.0, "valid": True},
        **{"completed": 100, "source": "pdbench", "variables": "{}", "invalid_reasons": "", "notes": "", "emulated": False},
        **{RATE: rate, "tok_s_user": 50.0, "ttft_ms_p50": 100.0, "ttft_ms_p99": 200.0, "itl_ms_mean": 20.0},
        **other,
    }


def runs(cell: Cell) -> list[Run]:
    return [
        Run(int(r["repeat"]), {name: float(r[name]) for name in (RATE, GOODPUT) if r.get(name) is not None}) for r in cell.rows
    ]


def decided(rows: Sequence[Row]) -> tuple[Table, list[Decision]]:
    made = table(rows)
    return made, decisions(made, runs)


# --- the frontier

POINTS = st.lists(st.tuples(st.integers(1, 9).map(float), st.integers(1, 9).map(float)), min_size=1, max_size=30)


def beats(one: tuple[float, float], other: tuple[float, float], higher_x: bool) -> bool:
    x = (one[0] - other[0]) * (1 if higher_x else -1)
    return x >= 0 and one[1] >= other[1] and one != other


@given(POINTS, st.booleans())
def test_a_point_is_on_the_frontier_unless_another_beats_it(points: list[tuple[float, float]], higher_x: bool) -> None:
    kept = set(frontier(points, higher_x))
    for i, point in enumerate(points):
        assert (i not in kept) == any(beats(other, point, higher_x) for other in points)


@given(POINTS, st.booleans())
def test_along_the_frontier_more_of_one_is_less_of_the_other(points: list[tuple[float, float]], higher_x: bool) -> None:
    line = list(dict.fromkeys(points[i] for i in frontier(points, higher_x)))
    for (x, y), (next_x, next_y) in pairwise(line):
        assert x < next_x
        assert (y > next_y) if higher_x else (y < next_y)


# --- the best configuration


def test_with_limits_configurations_are_chosen_by_what_kept_them() -> None:
    """2p1d makes more tokens, 1p1d more requests within the limits; one without limits, or none within, is no goodput."""
    rng = random.Random(1)

    def rows(**goodput: float | None) -> list[Row]:
        return [
            row(ratio, base * noise, n, goodput=None if (good := goodput[f"r{ratio}"]) is None else good * noise)
            for ratio, base in (("1p1d", 100), ("2p1d", 200))
            for n in range(3)
            for noise in [rng.lognormvariate(0, 0.01)]
        ]

    made, (found,) = decided(rows(r1p1d=40.0, r2p1d=8.0))
    assert made.goal == GOODPUT
    assert (found.state, found.leader.config.label) == ("best", "1p1d")
    first, said, *_ = answer.answer(made, [found])
    assert first == "1p1d is the best configuration at the one load, by requests/s within the limits, per GPU."
    assert "At concurrency 8, 512 in / 64 out: 1p1d, 1" in said
    (best,) = answer.best_table(made, [found]).rows
    assert len(best) == len(answer.best_table(made, [found]).head)
    assert answer._figure(made, found.leader).startswith(("9.", "10"))
    for lacks in (rows(r1p1d=None, r2p1d=8.0), rows(r1p1d=0.0, r2p1d=0.0)):
        made, (found,) = decided(lacks)
        assert made.goal == RATE
        assert found.leader.config.label == "2p1d"
    made, (found,) = decided(rows(r1p1d=40.0, r2p1d=0.0))
    assert made.goal == GOODPUT
    assert found.leader.config.label == "1p1d"
    assert found.lead is not None
    assert answer.percent(found.lead) == "any number of times"
    assert "nan" not in " ".join(answer.answer(made, [found]))
    assert heat._says(found)


NOISY = st.lists(st.lists(st.floats(90.0, 110.0), min_size=3, max_size=4), min_size=2, max_size=4)


@given(NOISY)
def test_the_leader_has_the_highest_mean_and_undecided_names_rivals(figures: list[list[float]]) -> None:
    rows = [row(f"{i + 1}p1d", value, n) for i, values in enumerate(figures) for n, value in enumerate(values)]
    made, (found,) = decided(rows)
    assert found.leader.mean(RATE) == max(cell.mean(RATE) for cell in made.cells)
    assert (found.state == "undecided") == bool(found.rivals)
    assert found.leader not in found.rivals
    assert found.lead is not None
    assert found.lead.value >= 1
    assert found.lead.low is not None
    assert found.lead.high is not None
    assert found.lead.low <= found.lead.value * (1 + 1e-9)
    assert found.lead.value <= found.lead.high * (1 + 1e-9) or found.lead.high < 1


@given(st.floats(50.0, 200.0), st.integers(3, 6), st.integers(2, 5))
def test_configurations_with_the_same_figures_are_never_ranked(rate: float, repeats: int, configs: int) -> None:
    rows = [row(f"{i + 1}p1d", rate * (1 + 0.01 * n), n) for i in range(configs) for n in range(repeats)]
    _, (found,) = decided(rows)
    assert found.state == "undecided"
    assert len(found.rivals) == configs - 1


def test_a_lead_far_beyond_the_noise_is_shown_and_one_repeat_shows_nothing() -> None:
    rng = random.Random(1)
    many = [row(r, base * rng.lognormvariate(0, 0.01), n) for r, base in (("1p1d", 100), ("2p1d", 200)) for n in range(3)]
    made, (found,) = decided(many)
    assert (found.state, found.leader.config.label) == ("best", "2p1d")
    (first, said, *_) = answer.answer(made, [found])
    assert first == "2p1d is the best configuration at the one load, by output tokens/s per GPU."
    assert "At concurrency 8, 512 in / 64 out: 2p1d" in said
    made, (found,) = decided([row("1p1d", 100.0), row("2p1d", 200.0)])
    assert found.state == "undecided"
    said = " ".join(answer.answer(made, [found]))
    assert "No best configuration was shown" in said
    assert "is the best" not in said


@given(NOISY, st.integers(0, 3))
def test_invalid_repeats_change_nothing_but_the_count(figures: list[list[float]], spoilt: int) -> None:
    rows = [row(f"{i + 1}p1d", value, n) for i, values in enumerate(figures) for n, value in enumerate(values)]
    bad = [row("1p1d", 1e6, 90 + n, valid=False, invalid_reasons="x") for n in range(spoilt)]
    (before, (one,)), (after, (two,)) = decided(rows), decided([*rows, *bad])
    assert one.leader.mean(RATE) == two.leader.mean(RATE)
    assert one.state == two.state
    assert [cell.mean(RATE) for cell in before.cells] == [cell.mean(RATE) for cell in after.cells]
    assert sum(len(cell.bad) for cell in after.cells) == spoilt


@given(st.lists(st.floats(90.0, 110.0), min_size=2, max_size=6), st.floats(0.1, 50.0))
def test_intervals_hold_the_figure_and_scale_with_it(values: list[float], scale: float) -> None:
    (cell,), (larger,) = (table([row("1p1d", k * value, n) for n, value in enumerate(values)]).cells for k in (1.0, scale))
    one, other = interval(cell, [cell]), interval(larger, [larger])
    assert one.low is not None
    assert one.high is not None
    assert one.low <= one.value <= one.high
    assert math.isclose(other.half_width or 0.0, one.half_width or 0.0, rel_tol=1e-6, abs_tol=1e-9)


def test_one_repeat_has_no_interval() -> None:
    (cell,) = table([row("1p1d", 100.0)]).cells
    assert interval(cell, [cell]).half_width is None


# --- configurations and loads


def test_an_inventory_is_named_by_its_folder_where_that_tells_it_from_the_others() -> None:
    def labels(*paths: str) -> set[str]:
        rows = [row("1p1d", 1.0, variables=json.dumps({"inventory": path})) for path in paths]
        return {config.label for config in table(rows).configs}

    assert labels("inventory/gh200", "inventory/a100.yml") == {"1p1d \u00b7 on gh200", "1p1d \u00b7 on a100"}
    assert labels("x/lab", "y/lab") == {"1p1d \u00b7 on x/lab", "1p1d \u00b7 on y/lab"}


def test_names_say_what_differs_and_nothing_else() -> None:
    made = table([row("1p1d", 1.0), row("2agg", 1.0)])
    assert [config.label for config in made.configs] == ["2agg", "1p1d"]
    backends = table([row("1p1d", 1.0, transfer_backend=name) for name in ("nixl", "mooncake")] + [row("2agg", 1.0)])
    assert {config.label for config in backends.configs} == {"2agg", "1p1d · nixl", "1p1d · mooncake"}
    sizes = table([row("1p1d", 1.0, gpus=2), row("2agg", 1.0), row("2p2d", 1.0)])
    assert {config.label for config in sizes.configs} == {"1p1d · 2 GPUs", "2agg", "2p2d"}
    swept = table([row("1p1d", 1.0, variables=f'{{"mem_fraction": {f}, "bench_input_len": 512}}') for f in (0.8, 0.9)])
    assert {config.label for config in swept.configs} == {"1p1d · mem_fraction=0.8", "1p1d · mem_fraction=0.9"}


def test_models_and_lengths_are_loads_of_their_own() -> None:
    made, found = decided([row("1p1d", 10.0, model="big"), row("1p1d", 90.0, model="small"), row("1p1d", 5.0, isl=1024.0)])
    assert len(made.configs) == 1
    assert {one.state for one in found} == {"alone"}
    assert len(found) == 3


def test_lengths_that_were_drawn_are_one_load_over_seeds() -> None:
    made = table([row("1p1d", 1.0, 1, isl=511.3), row("1p1d", 1.0, 2, isl=518.9), row("1p1d", 1.0, 1, isl=2044.5)])
    assert [load.isl for load in made.loads] == [510.0, 2000.0]
    assert len(table([row("1p1d", 1.0, isl=length) for length in (500.0, 512.0)]).loads) == 2


def asked(**said: object) -> str:
    return json.dumps({"isl": "512", "osl": "64", "num_requests": 100, "api": "chat", "prompt": "text", **said})


def test_lengths_are_one_load_as_they_were_spelled() -> None:
    """Means of drawn ones are whole numbers at times, and close to those of another distribution at others."""
    one, other = asked(isl="normal:1000:50"), asked(isl="normal:1090:50")
    drawn = [row("1p1d", 1.0, n, isl=isl, asked=one) for n, isl in enumerate((1000.3, 1000.0, 999.6, 1060.0))]
    made = table([*drawn, row("1p1d", 1.0, isl=1088.2, asked=other)])
    assert [len(cell.rows) for cell in made.cells] == [4, 1]
    assert [made.load_label(load) for load in made.loads] == [
        "concurrency 8, 1000 in / 64 out, prompts normal:1000:50",
        "concurrency 8, 1100 in / 64 out, prompts normal:1090:50",
    ]


def test_what_differs_beside_pace_and_lengths_is_another_load_and_told() -> None:
    made = table([row("1p1d", 1.0, n, asked=asked(num_requests=count)) for count in (100, 200) for n in (1, 2)])
    assert [len(cell.rows) for cell in made.cells] == [2, 2]
    assert [load.other for load in made.loads] == ["100 requests", "200 requests"]
    made = table([row("1p1d", 1.0, asked=asked(**said)) for said in ({}, {"arrival": "constant"}, {"api": "completions"})])
    assert [load.other for load in made.loads] == ["api chat", "api completions", "arrival constant, api chat"]
    (load,) = table([row("1p1d", 1.0, asked=asked())]).loads
    assert load.other == ""
    swept = '{"bench_warmup": 3, "bench_arrival": "constant"}'
    (load,) = table([row("1p1d", 1.0, variables=swept, asked=asked(arrival="constant"))]).loads
    assert load.other == "arrival constant, warmup 3"


def test_a_failed_run_belongs_to_its_cell_and_one_without_a_load_is_named() -> None:
    bad = row("", 0.0, 2, cell="1p1d", valid=False, gpus=None, engine=None, invalid_reasons="died")
    made = table([row("1p1d", 10.0), bad])
    (cell,) = made.cells
    assert (len(cell.rows), len(cell.bad)) == (1, 1)
    lost = {**bad, "isl": None, "osl": None, "concurrency": None, "invalid_reasons": "nothing was measured: no summary.json"}
    made = table([row("1p1d", 10.0), lost])
    assert len(made.cells) == 1
    (said,) = answer.caveats(made, [], [])
    assert said == "1 run measured nothing: 1p1d (repeat 2: nothing was measured: no summary.json)."
    assert "2 cells of the sweep never ran: a; b." in answer.caveats(made, [], ["a", "b"])


# --- grades

FACTS = st.builds(
    Facts,
    valid=st.integers(0, 5),
    invalid=st.integers(0, 3),
    completed=st.integers(0, 200),
    half_width=st.none() | st.floats(0, 0.5),
    calibrated=st.booleans(),
    imported=st.booleans(),
    notes=st.lists(st.sampled_from(("saturated", "short"))).map(tuple),
)


@given(FACTS)
def test_every_grade_has_its_rule_and_all_but_a_say_why(facts: Facts) -> None:
    found = grade(facts)
    assert found.letter in RULES
    assert (found.letter == "A") == (not found.why)
    assert (found.letter == "X") == (facts.valid == 0)
    assert all(note in found.why for note in facts.notes if facts.valid)


@given(FACTS)
def test_nothing_that_gets_worse_makes_the_grade_better(facts: Facts) -> None:
    worse = (
        Facts(facts.valid, facts.invalid + 1, facts.completed, facts.half_width, facts.calibrated, facts.imported, facts.notes),
        Facts(max(0, facts.valid - 1), facts.invalid, facts.completed, None, False, True, (*facts.notes, "saturated")),
    )
    assert all(grade(facts).letter <= grade(other).letter for other in worse)


def test_the_bounds_of_the_grades() -> None:
    good = Facts(2, 0, REQUESTS, NARROW, calibrated=True)
    assert grade(good).letter == "A"
    assert grade(Facts(2, 0, REQUESTS, NARROW + 0.001, True)).why == (f"interval ±{100 * (NARROW + 0.001):.1f} %",)
    assert grade(Facts(2, 0, REQUESTS, NARROW, False)).letter == "B"
    assert grade(Facts(2, 0, REQUESTS - 1, NARROW, True)).letter == "C"
    assert grade(Facts(1, 0, 100, None, True)).letter == "C"


# --- figures of a table


def of(rows: Sequence[Row]) -> Sweep:
    made, found = decided(rows)
    return Sweep(Path("nowhere"), {}, list(rows), made, found)


def drawn_lines(axes: Sequence[Axes]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(panel, label) -> the points of every line."""
    found = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            line: Any = handle.lines[0] if hasattr(handle, "lines") else handle
            xs, ys = (np.asarray(values, dtype=float).tolist() for values in (line.get_xdata(), line.get_ydata()))
            found[ax.get_title(), label] = list(zip(xs, ys, strict=True))
    return found


def test_lines_are_the_figures_of_the_table() -> None:
    rows = [
        row(ratio, 100.0 * place + size + length, concurrency=size, isl=length, ttft_ms_p50=7.0 * size, itl_ms_mean=2.0 + size)
        for place, ratio in enumerate(("2agg", "1p1d"), 1)
        for size in (4, 16, 1)
        for length in (256.0, 512.0)
    ]
    expected: list[tuple[Callable[[Sweep, Theme], Figure], Callable[[float, float, float], float]]] = [
        (lines.throughput, lambda place, size, length: 100.0 * place + size + length),
        (lines.ttft, lambda place, size, length: 7.0 * size),
        (lines.itl, lambda place, size, length: 2.0 + size),
    ]
    for plot, value in expected:
        figure = plot(of(rows), LIGHT)
        assert drawn_lines(figure.axes) == {
            (f"{length:g} in / 64 out", ratio): [(size, value(place, size, length)) for size in (1, 4, 16)]
            for place, ratio in enumerate(("2agg", "1p1d"), 1)
            for length in (256.0, 512.0)
        }
        plt.close(figure)


def test_the_frontier_says_that_its_rate_per_user_has_the_wait_in_it() -> None:
    figure = lines.pareto_user(of([row("1p1d", 10.0), row("2agg", 20.0)]), LIGHT)
    assert {ax.get_xlabel() for ax in figure.axes} == {"output tokens/s per user, TTFT included (mean of n / E2E)"}
    plt.close(figure)


def test_ttft_against_prompt_length_has_a_line_an_output_length() -> None:
    rows = [
        row("1p1d", 10.0, concurrency=size, isl=isl, osl=osl, ttft_ms_p50=isl / 8 + osl + size)
        for size in (1, 2, 4, 8)
        for isl in (256.0, 512.0, 1024.0)
        for osl in (64.0, 128.0)
    ]
    figure = lines.ttft_by_length(of(rows), LIGHT)
    # the lightest load, one in the middle, the heaviest
    assert drawn_lines(figure.axes) == {
        (f"1p1d, concurrency {size}", f"{osl:g} output tokens"): [(isl, isl / 8 + osl + size) for isl in (256, 512, 1024)]
        for size in (1, 4, 8)
        for osl in (64, 128)
    }
    plt.close(figure)


def test_the_map_names_a_winner_only_where_there_is_one() -> None:
    rows = [row(ratio, base + n, n, concurrency=4) for ratio, base in (("1p1d", 100.0), ("2p1d", 200.0)) for n in range(3)]
    rows += [row(ratio, 100.0 + n, n, concurrency=8) for ratio in ("1p1d", "2p1d") for n in range(3)]
    figure = heat.best_map(of(rows), LIGHT)
    (ax,) = figure.axes
    first, second = (text.get_text() for text in ax.texts)
    assert first.startswith("2p1d\n+")
    assert second.startswith("undecided\n")
    assert [bool(patch.get_hatch()) for patch in ax.patches] == [False, True]
    plt.close(figure)


@given(st.lists(st.floats(0.0, 9.0), min_size=8, max_size=40), st.integers(1, 5), st.booleans())
def test_rates_over_time_add_up_to_the_requests(begins: list[float], events: int, counted: bool) -> None:
    records = [
        Record(
            0, i, "measure", 64, 2 * events, begin, begin, begin + 0.5, begin + 0.5 + events, output_tokens=2 * events, ok=True
        )
        for i, begin in enumerate(begins)
    ]
    for record in records:
        record.chunk_s = [record.first_s + n for n in range(events)]
        record.chunk_tokens = [2] * events if counted else []
    (cell,) = table([row("1p1d", 1.0)]).cells
    found = inside.over_time(cell, records)
    assert found is not None
    width = found.when[1] - found.when[0]
    # Smoothing counts the first and the last part twice at most.
    for rate in (found.prefill, found.decode):
        edges = (rate[0] + rate[-1]) * width
        assert abs(rate.sum() * width - len(records)) <= max(edges, 1e-6)
    assert inside.over_time(cell, records[:7]) is None
