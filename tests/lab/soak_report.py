"""What a soak found, as a page, a picture and a file of figures."""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import soak
from lab.soak import Account, Growth, Window

#: What is sampled of every process, with its unit.
QUANTITIES = {"memory": "MB", "descriptors": "", "threads": ""}
COLOURS = {"kill": "#d62728", "partition": "#9467bd", "slow": "#ff7f0e", "disk": "#8c564b", "clock": "#17becf"}
WHAT = {
    "kill": "kill -9 of a worker; systemd starts it again",
    "partition": "no packet passes between two of h1, h2 and h3 (the router's)",
    "slow": "a host's cable at 5 or 20 Mbit/s, or with 25 or 80 ms more each way",
    "disk": "the state directory of a host is full, in the midst of serving",
    "clock": "the clock of a host's workers jumps by an hour or 5 s, either way, and back",
}


WHY = """
A fault's window ends once the router counts all workers and twelve requests in a row were answered. A request failed within
it when the time from its sending to its end, or to the client's limit, meets the window. Memory is what a process does not
share with files, of all its processes. Slopes begin {:.0f} s after a process's start, are those that all its lives share, and
their intervals take into account that samples follow one another. A leak: at the lower end of its interval the level would
double within a day.
"""
LIMITS = """
Emulated engine, no GPU: what a real engine's process does is not seen here. All hosts share two cores and one kernel with the
client; clocks are libfaketime's, of the workers alone; the client stands at the controller's end of the bridge and meets no fault
itself.
"""


@dataclass(frozen=True)
class Sample:
    """One process at one moment; ``life`` tells one start of it from the next. Memory is what it does not share with files."""

    t_s: float
    name: str
    life: int
    memory: float
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Soak:
    """A soak: what was asked for, and what came of it. ``served``: (second of sending, whether it was answered)."""

    seed: int
    minutes: float
    rate: float
    planned: int
    windows: list[Window]
    account: Account
    samples: list[Sample]
    served: list[tuple[float, bool]]
    warm_s: float
    day: str

    def growths(self) -> dict[str, dict[str, Growth | None]]:
        """Return how each quantity of each process grows."""
        found: dict[str, dict[str, Growth | None]] = {}
        for name in dict.fromkeys(sample.name for sample in self.samples):
            own = [sample for sample in self.samples if sample.name == name]
            times, lives = [one.t_s for one in own], [one.life for one in own]
            found[name] = {
                what: soak.growth(times, [float(getattr(one, what)) for one in own], lives, self.warm_s) for what in QUANTITIES
            }
        return found

    def leaks(self) -> list[str]:
        """Return what leaks, in words."""
        return [f"{what} of {name}" for name, row in self.growths().items() for what, one in row.items() if one and one.leaks]


def _table(head: list[str], rows: list[list[object]]) -> str:
    lines: list[list[object]] = [[*head], ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |\n" for line in lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 130, break_long_words=False, break_on_hyphens=False)


def _faults(done: Soak) -> str:
    rows: list[list[object]] = []
    for kind in soak.KINDS:
        own = [window for window in done.windows if window.fault.kind == kind]
        if not own:
            continue
        took = [window.healed_s - window.begin_s for window in own if window.healed_s is not None]
        failed = sum(count for (causes, _), count in done.account.failed.items() if kind in causes.split(" and "))
        longest = f"{max(took):.0f}" if len(took) == len(own) else "not healed"
        rows.append([kind, WHAT[kind], len(own), f"{sum(took):.0f}", longest, failed])
    return _table(["fault", "what", "times", "seconds in all", "longest (s)", "requests that failed in it"], rows)


def _grown(done: Soak) -> str:
    rows: list[list[object]] = []
    for name, row in done.growths().items():
        for what, found in row.items():
            if found is None:
                rows.append([name, what, "", "too few samples", ""])
                continue
            unit = f" {QUANTITIES[what]}".rstrip()
            slope = f"{found.per_hour:+.2f} [{found.low:+.2f}, {found.high:+.2f}]{unit}"
            rows.append([name, what, f"{found.level:.1f}{unit}", slope, "**leak**" if found.leaks else "none"])
    return _table(["process", "what", "level", "per hour, 95 % interval", "leak"], rows)


def page(done: Soak) -> str:
    """Return docs/results/soak.md."""
    told = done.account
    missed = [window for window in done.windows if window.healed_s is None]
    good = told.closed and not missed and not done.leaks()
    verdict = "**Nothing is lost, and nothing leaks.**" if good else "**Not as it should be**: " + "; ".join(
        [f"{told.lost} requests without a record"] * bool(told.lost)
        + [f"{told.twice} records twice"] * bool(told.twice)
        + [f"{len(told.unexplained)} failed outside of any fault"] * bool(told.unexplained)
        + [f"not served again after: {', '.join(window.fault.kind for window in missed)}"] * bool(missed)
        + [f"leaks: {', '.join(done.leaks())}"] * bool(done.leaks())
    )  # fmt: skip
    counts: list[list[object]] = [
        ["asked for", told.asked], ["on record", told.recorded], ["answered", told.answered],
        ["failed in a fault's window", told.failed.total()], ["failed outside of any", len(told.unexplained)],
        ["of the failed: no connection", told.unsent], ["without a record", told.lost],
    ]  # fmt: skip
    failures: list[list[object]] = [[cause, f"`{error}`", count] for (cause, error), count in told.failed.most_common()]
    failures += [["none known", f"`{error}` at {at:.1f} s", 1] for at, error in told.unexplained]
    about = (
        f"{done.day}, {done.minutes:g} minutes, {done.rate:g} requests a second at a constant rate, 3p3d on three systemd "
        f"hosts over SSH (tests/lab), {len(done.windows)} faults of {done.planned} that the seed's schedule has."
    )
    head = f"    make soak MINUTES={done.minutes:g} SEED={done.seed}\n\n{_wrapped(about)}\n\n{verdict}"
    return "\n\n".join(
        part.rstrip("\n")
        for part in (
            "# A soak: load, and faults at random", head, "![faults, requests, memory, descriptors](soak.png)",
            "## Every request", _table(["requests", "number"], counts), "## Every fault", _faults(done),
            "## Every failure", _table(["cause", "what the client saw", "number"], failures) if failures else "None.",
            "## What grows", _grown(done), _wrapped(WHY.format(done.warm_s)), "## What this does not show", _wrapped(LIMITS),
        )
    ) + "\n"  # fmt: skip


def plot(done: Soak, path: Path) -> None:
    """Draw requests, memory and descriptors over time, with the faults behind them."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(11, 9), sharex=True, layout="constrained")
    step = 10.0
    counts: dict[bool, dict[int, int]] = {True: defaultdict(int), False: defaultdict(int)}
    for at, ok in done.served:
        counts[ok][int(at // step)] += 1
    ends = range(1 + max((place for one in counts.values() for place in one), default=0))
    for ok, label, colour in ((True, "answered", "#2ca02c"), (False, "failed", "#d62728")):
        axes[0].plot(
            [place * step / 60 for place in ends], [counts[ok][place] / step for place in ends], color=colour, label=label
        )
    axes[0].set(ylabel="requests a second, by time of sending", ylim=(0, None))
    for axis, what in zip(axes[1:], ("memory", "descriptors"), strict=True):
        for name in dict.fromkeys(sample.name for sample in done.samples):
            own = [sample for sample in done.samples if sample.name == name]
            axis.plot([one.t_s / 60 for one in own], [getattr(one, what) for one in own], label=name, linewidth=1)
        axis.set(ylabel=f"{what} ({QUANTITIES[what]})" if QUANTITIES[what] else what, ylim=(0, None))
    axes[-1].set(xlabel="minutes")
    shown: set[str] = set()
    for window in done.windows:
        end = window.healed_s if window.healed_s is not None else done.minutes * 60
        kind = window.fault.kind
        for axis in axes:
            named = kind if axis is axes[0] and kind not in shown else None
            axis.axvspan(window.begin_s / 60, end / 60, color=COLOURS[kind], alpha=0.18, linewidth=0, label=named)
        shown.add(kind)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, ncols=4, loc="upper left", bbox_to_anchor=(0, 1.16))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write(done: Soak, folder: Path) -> None:
    """Write soak.md, soak.png and soak.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "soak.md").write_text(page(done))
    plot(done, folder / "soak.png")
    told = {**asdict(done), "account": {**asdict(done.account), "failed": [[*key, n] for key, n in done.account.failed.items()]}}
    # one sample of each process a minute: the picture has the rest
    told["samples"] = [asdict(one) for one in done.samples if one.t_s % 60 < 5]
    del told["served"]
    told["growth"] = {name: {what: one and asdict(one) for what, one in row.items()} for name, row in done.growths().items()}
    (folder / "soak.json").write_text(json.dumps(told, indent=1) + "\n")
