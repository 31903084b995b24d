"""A sweep that is killed anywhere, resumed, and whose cells fail: nothing measured is lost, and nothing is measured twice."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.sweep import journal
from pdbench.sweep.checkout import ROOT
from pdbench.sweep.drive import Ended, Sweep
from pdbench.sweep.grid import Cell, loads
from pdbench.sweep.plays import Play, Plays
from pdlib.errors import UserError


@pytest.fixture(autouse=True, scope="module")
def synced() -> Iterator[list[int]]:
    """Thousands of lines are written here: the disk is not waited for, only counted."""
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", calls.append)
        yield calls


class Killed(BaseException):
    """The controller is gone: nothing after this line happens."""


class Bomb:
    """Goes off at the n-th event."""

    def __init__(self, at: int | None = None):
        self.left = at

    def tick(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise Killed
            self.left -= 1


def cell(name: str, ratio: str, model: str = "m") -> Cell:
    return Cell(name, {"ratio": ratio}, {"ratio": ratio, "model": model}, {}, "inventory/x")


class Fake:
    """Measures at once; ``bad`` says how (cell, repeat, attempt) ends, ``dead`` which ratios never come up."""

    def __init__(self, bomb: Bomb, bad: Callable[[str, int, int], str] = lambda *_: journal.FINISHED, dead: tuple[str, ...] = ()):
        self.bomb, self.bad, self.dead = bomb, bad, dead
        self.up = ""
        self.deploys: list[str] = []
        self.fetched: list[str] = []
        self.runs: list[tuple[str, int]] = []

    def deploy(self, cell: Cell, folder: Path) -> Ended:
        self.bomb.tick()
        assert folder.is_dir()
        self.deploys.append(cell.deploy["ratio"])
        if cell.deploy["ratio"] in self.dead:
            self.up = ""
            return Ended(journal.FAILED, "no such host")
        self.up = cell.deployment
        self.bomb.tick()
        return Ended()

    def measure(self, cell: Cell, repeat: int, folder: Path) -> Ended:
        assert self.up == cell.deployment, "measured what is not deployed"
        assert list(folder.iterdir()) == [], "an attempt has a folder of its own"
        self.bomb.tick()
        (folder / "summary.json").write_text(f"{cell.id} {repeat}")
        self.bomb.tick()
        self.runs.append((cell.id, repeat))
        how = self.bad(cell.id, repeat, int(folder.name.rpartition("a")[2]))
        return Ended(how, "" if how == journal.FINISHED else "because")

    def fetch_ahead(self, cell: Cell) -> None:
        self.fetched.append(cell.deploy["model"])


class Nobody:
    def doing(self, *_: Any) -> None:
        pass

    def done(self, *_: Any) -> None:
        pass


class Bombed(journal.Journal):
    """A journal whose writer may be killed before a line, in it, or after it."""

    def __init__(self, folder: Path, bomb: Bomb):
        super().__init__(folder)
        self.bomb = bomb

    def write(self, event: str, **fields: Any) -> None:
        self.bomb.tick()
        if self.bomb.left == 0:
            with open(self.path, "a") as file:
                file.write('{"event": "fini')
        self.bomb.tick()
        super().write(event, **fields)
        self.bomb.tick()


CELLS = [cell(f"{ratio}-{load}", ratio) for ratio in ("1p1d", "2p1d", "agg") for load in ("a", "b")]
ORDER = [(one.id, 1) for one in CELLS] + [(one.id, 2) for one in reversed(CELLS)]


def session(folder: Path, driver: Fake, bomb: Bomb, retries: int = 1, cells: list[Cell] = CELLS) -> None:
    order = ORDER if cells is CELLS else [(one.id, 1) for one in cells]
    Sweep(folder, cells, order, Bombed(folder, bomb), driver, Nobody()).run(retries)


def valid_runs(folder: Path) -> Counter[tuple[str, int]]:
    events = journal.Journal(folder).events
    return Counter((one["cell"], one["repeat"]) for one in events if one["event"] == journal.FINISHED)


def sometimes(name: str, repeat: int, attempt: int) -> str:
    """Every third cell fails at first, one is never valid."""
    if name == "2p1d-b":
        return journal.INVALID
    return journal.FAILED if attempt == 1 and random.Random(f"{name}{repeat}").random() < 0.4 else journal.FINISHED


def test_killed_at_every_event_in_turn_a_resumed_sweep_has_the_same_valid_runs(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    session(whole, Fake(Bomb(), sometimes), Bomb())
    wanted = valid_runs(whole)
    assert set(wanted) == {one for one in ORDER if one[0] != "2p1d-b"}
    assert set(wanted.values()) == {1}
    for at in range(10_000):
        folder = tmp_path / str(at)
        folder.mkdir()
        bomb = Bomb(at)
        try:
            session(folder, Fake(bomb, sometimes), bomb)
        except Killed:
            again = Fake(Bomb(), sometimes)
            before = valid_runs(folder)
            session(folder, again, Bomb())
            assert not set(before) & set(again.runs), "a valid run is not measured again"
            assert valid_runs(folder) == wanted
            last = journal.Journal(folder).last()
            assert {key for key, end in last.items() if end["event"] != journal.FINISHED} == {("2p1d-b", 1), ("2p1d-b", 2)}
            for end in last.values():
                assert (folder / end["run"] / "summary.json").read_text() == f"{end['cell']} {end['repeat']}"
        else:
            break
    assert at > 60, "the bomb never went off late enough"


@given(st.lists(st.integers(0, 60), max_size=6))
def test_killed_again_and_again_it_still_ends_with_every_cell_once(bombs: list[int]) -> None:
    with TemporaryDirectory() as name:
        folder, lost = Path(name), 0
        for at in bombs:
            bomb, driver = Bomb(at), Fake(Bomb())
            driver.bomb = bomb
            try:
                session(folder, driver, bomb)
            except Killed:
                lost += 1
        session(folder, Fake(Bomb()), Bomb())
        assert valid_runs(folder) == Counter(ORDER)
        started = [one for one in journal.Journal(folder).events if one["event"] == "started"]
        assert len(started) <= len(ORDER) + lost, "a kill costs at most the running cell"


def test_the_deployment_at_the_turn_is_not_deployed_again(tmp_path: Path) -> None:
    driver = Fake(Bomb())
    session(tmp_path, driver, Bomb())
    assert driver.deploys == ["1p1d", "2p1d", "agg", "2p1d", "1p1d"]


def test_a_deployment_that_does_not_come_up_costs_its_cells_and_no_others(tmp_path: Path) -> None:
    driver = Fake(Bomb(), dead=("2p1d",))
    session(tmp_path, driver, Bomb())
    assert driver.deploys == ["1p1d", "2p1d", "2p1d", "agg", "2p1d", "2p1d", "1p1d"], "two attempts a visit, not two a cell"
    last = journal.Journal(tmp_path).last()
    bad = {key for key, end in last.items() if end["event"] == journal.FAILED}
    assert bad == {("2p1d-a", 1), ("2p1d-b", 1), ("2p1d-a", 2), ("2p1d-b", 2)}
    assert last["2p1d-a", 1]["why"] == "deploy: no such host"
    assert set(valid_runs(tmp_path)) == set(ORDER) - bad


@pytest.mark.parametrize("how", [journal.FAILED, journal.INVALID])
def test_a_cell_that_stays_bad_is_tried_as_often_as_configured_and_what_is_up_is_looked_at_again(
    tmp_path: Path, how: str
) -> None:
    driver = Fake(Bomb(), lambda name, *_: how if name == "2p1d-a" else journal.FINISHED)
    session(tmp_path, driver, Bomb(), retries=2)
    events = journal.Journal(tmp_path).events
    tries = [one["attempt"] for one in events if one["event"] == how and one["repeat"] == 1]
    assert tries == [1, 2, 3]
    assert driver.deploys.count("2p1d") == 3 + 1 + 1 + 2, "before each attempt, and before the cell after it"
    assert all((tmp_path / f"runs/2p1d-a/r1a{attempt}").is_dir() for attempt in tries), "evidence is kept"


def test_the_next_model_is_fetched_while_this_one_is_measured(tmp_path: Path) -> None:
    cells = [cell("a", "1p1d"), cell("b", "2p1d"), cell("c", "1p1d", "other"), cell("d", "2p1d", "third")]
    driver = Fake(Bomb())
    session(tmp_path, driver, Bomb(), cells=cells)
    assert driver.fetched == ["other", "third"]


# ---------------------------------------------------------------- the folder


def test_two_sweeps_cannot_be_in_one_folder(tmp_path: Path) -> None:
    with (
        journal.locked(tmp_path),
        pytest.raises(UserError, match="another sweep is at it \\(process"),
        journal.locked(tmp_path),
    ):
        pass
    with journal.locked(tmp_path):
        pass


def test_every_line_is_on_disk_before_anything_else_happens(tmp_path: Path, synced: list[int]) -> None:
    before = len(synced)
    made = journal.Journal(tmp_path)
    for number in range(3):
        made.write("started", cell="a", repeat=1, attempt=number)
    assert len(synced) == before + 3


def test_a_journal_that_was_cut_off_goes_on_with_a_line_of_its_own(tmp_path: Path) -> None:
    first = journal.Journal(tmp_path)
    first.write("started", cell="a", repeat=1, attempt=1)
    with open(first.path, "a") as file:
        file.write('{"event": "finis')
    second = journal.Journal(tmp_path)
    second.write("started", cell="a", repeat=1, attempt=2)
    lines = [json.loads(line) for line in first.path.read_text().splitlines()]
    assert [line["attempt"] for line in lines] == [1, 2]
    first.path.write_text("nonsense\n" + first.path.read_text())
    with pytest.raises(UserError, match="line 1: no event of a sweep"):
        journal.Journal(tmp_path)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ({"grid": {"ratio": ["agg"]}, "repeats": 2}, None),
        ({"grid": {"ratio": ["agg", "2agg"]}, "repeats": 2}, "grid.ratio was ['agg'] and is ['agg', '2agg']"),
        ({"grid": {"ratio": ["agg"]}}, "repeats was 2 and is gone"),
        ({"grid": {"ratio": ["agg"], "isl": [1]}, "repeats": 2}, "grid.isl is new: [1]"),
    ],
)
def test_a_changed_file_is_told_by_its_difference(after: Any, said: str | None) -> None:
    assert journal.difference({"grid": {"ratio": ["agg"]}, "repeats": 2}, after) == said


def test_what_a_killed_attempt_had_fetched_goes_into_its_folder_and_others_load_beside_the_cells(tmp_path: Path) -> None:
    staging, own = tmp_path / "runs/a/.r1a2", "20260101-000000-1p1d-a-r1a2"
    for run in (own, "20260101-000000-1p1d-a-r1a1"):
        (staging / run).mkdir(parents=True)
        (staging / run / "summary.json").write_text(run)
    (tmp_path / "runs/a/r1a2").mkdir()
    (tmp_path / "runs/a/r1a2/bench.log").write_text("cut off")
    Plays(tmp_path, None, {}, lambda line: None).collect_interrupted()
    assert (tmp_path / "runs/a/r1a2/summary.json").read_text() == own
    assert sorted(path.name for path in (tmp_path / "runs/a").iterdir()) == ["r1a2"]
    assert (tmp_path / "left-over/20260101-000000-1p1d-a-r1a1/summary.json").is_file()


# ---------------------------------------------------------------- the plays


def test_what_was_just_deployed_is_not_gone_through_again_and_a_strangers_load_is_looked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, tuple[str, ...]]] = []
    monkeypatch.setattr(Play, "wait", lambda self, tick: ran.append((self.playbook, tuple(self.skip))))
    monkeypatch.setattr("pdbench.sweep.plays.inventory_path", str)
    driver = Plays(tmp_path, None, loads(CELLS), lambda line: None)
    for number, one in enumerate((CELLS[0], CELLS[1])):
        folder = tmp_path / "runs" / one.id / "r1a1"
        folder.mkdir(parents=True)
        if not number:
            driver.deploy(one, folder)
        driver.measure(one, 1, folder)
    known = ("converge", "draw")
    assert ran == [("deploy_pd.yml", ()), ("bench.yml", known), ("bench.yml", (*known, "left_over"))]
    # A tag that nothing has would skip nothing, and nobody would see it.
    plays = [path.read_text() for path in (*ROOT.glob("playbooks/*.yml"), *ROOT.glob("roles/*/tasks/*.yml"))]
    for tag in (*known, "left_over"):
        assert any(f"tags: [{tag}]" in text or f"'{tag}' not in ansible_skip_tags" in text for text in plays)
