"""A stamp of the kernel's is put on the client's own clock; being away between two readings of clocks must not move it."""

from __future__ import annotations

import pytest

from pdbench.run import wire

WALL = 1.7e9


class Clocks:
    """Two clocks that run alike; after reading k the process is away for ``away[k]`` seconds."""

    def __init__(self, away: dict[int, float]) -> None:
        self.now, self.reads, self.away = 100.0, 0, away

    def _read(self) -> float:
        found = self.now
        self.now += 1e-7 + self.away.get(self.reads, 0.0)
        self.reads += 1
        return found

    def perf_counter(self) -> float:
        return self._read()

    def time(self) -> float:
        return self._read() + WALL


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    made = Clocks({})
    monkeypatch.setattr(wire, "perf_counter", made.perf_counter)
    monkeypatch.setattr("pdbench.run.wire.time.time", made.time)
    return made


@pytest.mark.parametrize("at", [0, 1])
def test_a_process_that_was_away_between_two_clocks_asks_again(clocks: Clocks, at: int) -> None:
    clocks.away = {at: 0.3}
    now, behind = wire.clocks()
    assert behind == pytest.approx(-WALL, abs=1e-6)
    assert now == pytest.approx(clocks.now, abs=1e-6)
    assert clocks.reads == 6


def test_two_readings_suffice_where_nothing_came_between(clocks: Clocks) -> None:
    assert wire.clocks()[1] == pytest.approx(-WALL, abs=1e-6)
    assert clocks.reads == 3


def test_a_machine_that_is_never_still_gives_the_closest_pair(clocks: Clocks) -> None:
    clocks.away = dict.fromkeys(range(100), 0.5) | {3: 1e-4, 4: 1e-4}
    assert wire.clocks()[1] == pytest.approx(-WALL, abs=2e-4)
    assert clocks.reads <= 12
