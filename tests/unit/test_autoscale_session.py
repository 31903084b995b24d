"""How a session of `pdbench autoscale` goes on and ends, with plays that do as they are told."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pdbench.autoscale import cli, session
from pdbench.sweep import plays

WORDS = ["--slo-ttft-ms", "1000", "--slo-tpot-ms", "50", "--every", "0.01", "--rest", "0.01"]
WINDOW = {"at": 1.0, "kind": "window", "says": "prefill waits", "pressures": [1.4, 0.2], "wish": "prefill"}
WANTS = {**WINDOW, "ratio": "1p2d", "to": "2p1d"}
LOST = {"at": 1.0, "kind": "window", "ratio": None, "silent": {"h1": "unreachable"}}
#: of a watch: what it puts into the log, and why it failed ("" when it did not)
Watched = tuple[list[Mapping[str, Any]], str]
OVER: Watched = ([], "")


class Plays:
    """What plays do, in their order.

    ``changes``: why each change failed, "" when it was made; ``unfit``: why `--check` refuses a ratio, with its exit code.
    """

    def __init__(self, watches: list[Watched], changes: list[str], unfit: Mapping[str, tuple[int, str]] | None = None) -> None:
        self.watches, self.changes, self.asked = watches, changes, list[str]()
        self.unfit, self.checked = unfit or {}, list[str]()
        #: what each watch is not to ask for
        self.left_out = list[Any]()
        #: how often Ctrl-C comes while a change is waited for
        self.interrupts = 0

    def play(
        self, name: str, given: Mapping[str, Any], *rest: Any, env: Mapping[str, str] | None = None, check: bool = False
    ) -> Any:
        return Fake(self, name, given, (env or {}).get("PD_WATCH_JOB", ""), check)


class Ended:
    """The end of a change, before which Ctrl-C comes."""

    def __init__(self, script: Plays) -> None:
        self.script = script

    def wait(self, timeout: float) -> bool:
        if self.script.interrupts:
            self.script.interrupts -= 1
            raise KeyboardInterrupt
        return True


class Fake:
    def __init__(self, script: Plays, name: str, given: Mapping[str, Any], job: str, check: bool) -> None:
        self.script, self.name, self.given, self.job, self.check = script, name, given, job, check
        self.line, self.why, self.rc = "", "", 0
        self.ended, self.stop = Ended(script), threading.Event()

    def wait(self, tick: Any = None) -> None:
        if self.check:
            self.script.checked.append(self.given["ratio"])
            self.rc, self.why = self.script.unfit.get(self.given["ratio"], (0, ""))
            return
        wrote, self.why = self.script.watches.pop(0)
        job = json.loads(Path(self.job).read_text())
        self.script.left_out.append(job["unfit"])
        with open(job["log"], "a") as log:
            log.writelines(json.dumps(entry) + "\n" for entry in wrote)
        tick("")
        self.rc = int(bool(self.why))

    def start(self) -> None:
        assert self.name == "rebalance.yml"
        assert not self.check
        self.script.asked.append(self.given["ratio"])
        self.why = self.script.changes.pop(0)
        self.rc = int(bool(self.why))


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, script: Plays, *words: str) -> int:
    monkeypatch.setattr(plays, "Play", script.play)
    return cli.main([*WORDS, "--output", str(folder), *words])


def changes(folder: Path) -> list[tuple[str, bool]]:
    entries = [json.loads(line) for line in (folder / session.LOG).read_text().splitlines()]
    return [(entry["to"], entry["ok"]) for entry in entries if entry["kind"] == "change"]


def test_a_change_that_fails_is_typed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Plays([([WANTS], ""), OVER], ["decode-1 did not drain", ""])
    assert run(monkeypatch, tmp_path / "o", script) == 0
    assert script.asked == ["2p1d", "2p1d"]
    assert changes(tmp_path / "o") == [("2p1d", False), ("2p1d", True)]
    assert "FAILED: decode-1 did not drain" in capsys.readouterr().out


def test_two_failures_end_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = Plays([([WANTS], "")], ["h2 is gone", "h2 is gone"])
    assert run(monkeypatch, tmp_path / "o", script) == 1
    said = capsys.readouterr()
    assert "rebalance.yml -e ratio=2p1d completes it" in said.err
    assert "2 changes" in said.out


def test_a_lock_that_somebody_else_holds_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = "the deployment is being changed by pid 7: wait for it"
    script = Plays([([WANTS], ""), ([WANTS], ""), ([WANTS], ""), OVER], [held, held, held])
    assert run(monkeypatch, tmp_path / "o", script) == 0
    assert len(script.asked) == 3
    assert "postponed: the deployment is being changed by" in capsys.readouterr().out


def test_what_cannot_be_watched_from_the_start_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "o", Plays([([], "nothing is deployed")], [])) == 2
    assert "nothing is deployed" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_what_can_no_longer_be_watched_ends_it_after_a_while(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = Plays([([WANTS], ""), *[([], "h1 unreachable")] * session.UNWATCHED], [""])
    assert run(monkeypatch, tmp_path / "o", script) == 1
    again = Plays([([WANTS], ""), *[([], "h1 unreachable")] * (session.UNWATCHED - 1), OVER], [""])
    assert run(monkeypatch, tmp_path / "p", again) == 0


def test_lost_windows_are_gaps_of_the_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = Plays([([{**WANTS, "to": None}, LOST, LOST], "")], [])
    assert run(monkeypatch, tmp_path / "o", script) == 0
    assert (tmp_path / "o" / session.PICTURE).stat().st_size > 5000
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [session.LOG, session.PICTURE]


def test_a_dry_run_asks_for_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = Plays([([WANTS], ""), ([WANTS], ""), OVER], [])
    assert run(monkeypatch, tmp_path / "o", script, "--dry-run") == 0
    assert script.asked == []
    assert script.checked == ["2p1d"], "once is enough"


def test_a_ratio_that_the_hosts_have_no_room_for_is_said_once_and_not_wished_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Plays(
        [([WANTS], ""), ([{**WANTS, "to": None, "unfit": "2p1d"}], "")], [], {"2p1d": (2, "no GPU is left for prefill-1")}
    )
    assert run(monkeypatch, tmp_path / "o", script) == 0
    assert script.asked == []
    assert script.left_out == [[], [["1p2d", "2p1d"]]]
    said = capsys.readouterr().out
    assert "1p2d -> 2p1d: not possible: no GPU is left for prefill-1 (rebalance.yml --check)" in said
    assert "prefill wants a worker, but 2p1d is not possible" in said
    assert (tmp_path / "o" / session.PICTURE).stat().st_size > 5000


def test_what_was_refused_is_asked_again_after_a_while(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(session, "UNFIT_S", 0.0)
    script = Plays([([WANTS], ""), ([WANTS], ""), OVER], [], {"2p1d": (4, "h2: timed out")})
    assert run(monkeypatch, tmp_path / "o", script) == 0
    assert script.checked == ["2p1d", "2p1d"]
    assert script.left_out == [[], [], []]
    assert script.asked == []


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_lets_a_change_end_and_a_second_one_cuts_it_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], times: int
) -> None:
    script = Plays([([WANTS], "")], [""])
    script.interrupts = times
    monkeypatch.setattr(plays, "end_orphans", lambda scratch: [])
    assert run(monkeypatch, tmp_path / "o", script) == 0
    said = capsys.readouterr().out
    assert "the change is brought to its end first" in said
    assert changes(tmp_path / "o") == [("2p1d", times == 1)]
    assert ("completes the change" in said) == (times == 2)
