"""The answer in words: the best configuration for each load, by how much, and what was not shown. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from pdbench.compare.judge import ENOUGH
from pdbench.report.tables import Table as Rows
from pdbench.report.tables import number as shown
from pdbench.sweep.report.choose import Decision, Interval, interval
from pdbench.sweep.report.data import GOALS, GOODPUT, RATE, Cell, Table
from pdbench.sweep.trust import Grade

#: more loads than this are told in the table, not one by one
_MOST_SENTENCES = 8


def answer(table: Table, found: Sequence[Decision]) -> list[str]:
    """Return the paragraphs at the top of the page; the first says the whole in one sentence."""
    if not found:
        return ["Nothing was shown: no cell of the sweep has a valid repeat with a figure."]
    best = [one for one in found if one.state == "best"]
    rest = len(found) - len(best)
    wins = Counter(one.leader.config.label for one in best)
    ahead = " and ".join(f"{label} at {_of(count, len(found))}" for label, count in wins.most_common())
    if not best:
        lines = [f"No best configuration was shown, at any of {_many(len(found), 'load')}."]
    elif len(wins) == 1 and not rest:
        lines = [f"{next(iter(wins))} is the best configuration at {_all(len(found))}, by {GOALS[table.goal]}."]
    else:
        tail = f"; at {_of(rest, len(found))} no best one was shown" if rest else ""
        lines = [f"The best configuration, by {GOALS[table.goal]}, is {ahead}{tail}."]
    if len(found) <= _MOST_SENTENCES:
        lines += [sentence(table, one) for one in found]
    return [*lines, *_aggregated(table, found)]


def _of(count: int, whole: int) -> str:
    return f"{count} of {_many(whole, 'load')}"


def _all(count: int) -> str:
    return {1: "the one load", 2: "both loads"}.get(count, f"all {count} loads")


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def sentence(table: Table, one: Decision) -> str:
    """Say what a load's cells show, and what they do not."""
    where, name = table.load_label(one.load), one.leader.config.label
    value = f"{_figure(table, one.leader)} {GOALS[table.goal]}"
    if one.state == "alone" or one.runner_up is None or one.lead is None:
        return f"At {where}: only {name} was measured, {value}; there is nothing to compare it with."
    rival = one.runner_up.config.label
    if one.state == "best":
        return f"At {where}: {name}, {value}, {percent(one.lead)} more than {rival}, the next."
    names = ", ".join(cell.config.label for cell in one.rivals)
    why = f" ({one.why})" if one.why else ""
    return (
        f"At {where}: no difference was shown between {name}, {value}, and {names}{why}; its lead over {rival} "
        f"is {percent(one.lead)}."
    )


def percent(lead: Interval) -> str:
    """Return how much more one figure is than another, ``8.1 % (2.0–14.5 %)``."""
    if lead.value == math.inf:
        return "any number of times"
    middle = f"{100 * (lead.value - 1):.1f} %"
    if lead.low is None or lead.high is None:
        return middle
    return f"{middle} ({100 * (lead.low - 1):.1f} to {100 * (lead.high - 1):.1f} %)"


def bounded(one: Interval) -> str:
    """Return a figure with its interval: ``38.2 (37.1–39.3)``."""
    return shown(one.value) if one.low is None else f"{shown(one.value)} ({shown(one.low)}–{shown(one.high)})"


def _aggregated(table: Table, found: Sequence[Decision]) -> list[str]:
    """Say how disaggregated configurations stand beside aggregated ones of as many GPUs; that none was measured is said, too."""
    agg = {config for config in table.configs if dict(config.key).get("ratio", "").endswith("agg")}
    apart = [cell for cell in table.measured if cell.config not in agg]
    if not apart:
        return []
    together = [cell for cell in table.measured if cell.config in agg]
    if not together:
        return ["No aggregated configuration was measured, so this says nothing of whether to disaggregate at all."]
    gains = []
    for one in found:
        base = [cell for cell in table.under(one.load) if cell.config in agg]
        others = [cell for cell in table.under(one.load) if cell.config not in agg]
        if not base or not others:
            continue
        best = max(others, key=lambda cell: cell.mean(table.goal))
        same = [cell for cell in base if cell.gpus == best.gpus]
        if same:
            rival = max(same, key=lambda cell: cell.mean(table.goal))
            below = rival.mean(table.goal)
            gains.append((best.mean(table.goal) / below - 1 if below > 0 else math.inf, best, rival))
    if not gains:
        return ["No aggregated configuration holds as many GPUs as a disaggregated one under the same load."]
    low, high = min(gains, key=lambda g: g[0]), max(gains, key=lambda g: g[0])
    if len(gains) == 1:
        return [f"Disaggregated against aggregated at equal GPUs: {_gain(table, low)} (the figures, without regard to noise)."]
    return [
        f"Disaggregated against aggregated at equal GPUs, the best of each (the figures, without regard to noise): from "
        f"{_gain(table, low)} to {_gain(table, high)}."
    ]


def _gain(table: Table, gain: tuple[float, Cell, Cell]) -> str:
    share, best, rival = gain
    more = "any number of times" if share == math.inf else f"{100 * share:+.1f} %"
    return f"{more} ({best.config.label} against {rival.config.label}, {table.load_label(best.load)})"


def caveats(table: Table, found: Sequence[Decision], unmeasured: Sequence[str] = ()) -> list[str]:
    """Return what the figures do not show; ``unmeasured``: cells of the sweep that have no run."""
    lines = []
    if unmeasured:
        lines.append(f"{_many(len(unmeasured), 'cell')} of the sweep never ran: {_some(unmeasured)}.")
    if table.nothing:
        runs = [f"{row.get('cell')} (repeat {row.get('repeat')}: {row.get('invalid_reasons')})" for row in table.nothing]
        lines.append(f"{_many(len(runs), 'run')} measured nothing: {_some(runs)}.")
    few = min((len(cell.rows) for cell in table.measured), default=ENOUGH)
    if few < ENOUGH and any(one.state == "undecided" for one in found):
        lines.append(
            f"With fewer than {ENOUGH} valid repeats of a configuration, only large differences can be shown; more repeats show "
            "smaller ones (pdbench compare says how many)."
        )
    lost = [cell for cell in table.cells if cell not in table.measured]
    if lost:
        lines.append(
            f"{_many(len(lost), 'cell')} of {len(table.cells)} had no valid repeat with a figure: not in what is said above."
        )
    holes = [
        f"{table.load_label(one.load)} ({', '.join(c.label for c in table.configs if c not in have)})"
        for one in found
        if len(have := {cell.config for cell in table.under(one.load)}) < len(table.configs)
    ]
    if holes:
        lines.append(f"Not every configuration was measured under every load; missing: {_some(holes)}.")
    if len({cell.gpus for cell in table.measured}) > 1:
        lines.append(
            "Configurations hold different numbers of GPUs (the names of the odd ones say so). Figures are per GPU over all of "
            "them, but the load was the same: fewer GPUs are busier under it, which favours them here. Compare those of one size."
        )
    return lines


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_SENTENCES
    return "; ".join(names[:_MOST_SENTENCES]) + (f"; and {more} more" if more > 0 else "")


def _figure(table: Table, cell: Cell) -> str:
    """Return what configurations are chosen by, of a cell, with its interval."""
    return bounded(interval(cell, table.under(cell.load), table.goal))


def _heads(table: Table) -> list[str]:
    good = ["good requests/s per GPU (95 %)", "tokens/s per GPU"]
    return good if table.goal == GOODPUT else ["tokens/s per GPU (95 %)"]


def best_table(table: Table, found: Sequence[Decision]) -> Rows:
    """Return a row for each load: what is best there, its figures, its lead over the next."""
    rows = []
    for one in found:
        leader = one.leader
        lead = f"{percent(one.lead)}, {one.runner_up.config.label}" if one.lead and one.runner_up else "–"
        name = leader.config.label
        verdict = {"best": name, "alone": f"{name} (alone)"}.get(one.state, f"not shown (highest: {name})")
        rows.append(
            [
                table.load_label(one.load),
                verdict,
                _figure(table, leader),
                *([shown(leader.mean(RATE))] if table.goal != RATE else []),
                *(shown(leader.mean(metric)) for metric in ("tok_s_user", "ttft_ms_p50", "itl_ms_mean")),
                lead,
            ]
        )
    head = ["load", "best", *_heads(table), "tokens/s per user, incl. TTFT", "TTFT p50 (ms)", "ITL mean (ms)"]
    head += ["lead (95 %) over the next"]
    return Rows("Best configuration by load", [(name, 1) for name in head], [], rows)


def trust_table(table: Table, grades: Sequence[tuple[Cell, Grade]]) -> Rows:
    """Return a row for each cell: its grade, its repeats, its figures, and why the grade is not a better one."""
    rows = []
    for cell, grade in grades:
        measured = cell in table.measured
        figures = [_figure(table, cell) if measured else "–"]
        figures += [shown(cell.mean(RATE)) if measured else "–"] if table.goal != RATE else []
        reasons = list(grade.why)
        if grade.letter == "X":
            reasons += dict.fromkeys(str(row.get("invalid_reasons") or "not judged") for row in cell.bad)
        rows.append(
            [
                table.load_label(cell.load),
                cell.config.label,
                grade.letter,
                f"{len(cell.rows)} of {len(cell.rows) + len(cell.bad)}",
                *figures,
                "; ".join(reasons) or "–",
            ]
        )
    head = ["load", "configuration", "trust", "valid repeats", *_heads(table), "why not better"]
    return Rows("Every cell", [(name, 1) for name in head], [], rows)
