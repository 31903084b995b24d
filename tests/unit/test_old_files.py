"""Files of older checkouts are read as they are, and one of a later checkout is refused in words (docs/formats.md)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pdbench import __version__, cli
from pdlib import deployed, plan_file, settings
from pdlib.errors import UserError

REPO = Path(__file__).resolve().parents[2]
OLD = REPO / "tests" / "data" / "old"
RUNS = sorted(path.relative_to(OLD / "sweep") for path in (OLD / "sweep" / "runs").glob("*/*"))
#: the files of a run with a number of their own; a manifest has it one level down
NUMBERED = ("summary.json", "run.json", "evidence.json", "validity.json", "plan.json", "manifest.json")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the old sweep: reports are written into it."""
    return Path(shutil.copytree(OLD / "sweep", tmp_path / "sweep"))


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """What a verb of pdbench prints, with its exit code."""
    code = cli.main([str(word) for word in words])
    out, errors = capsys.readouterr()
    return code, out + errors


def test_the_samples_are_there_with_every_number_at_one() -> None:
    assert len(RUNS) == 4
    for run in RUNS:
        for name in NUMBERED:
            told = json.loads((OLD / "sweep" / run / name).read_text())
            assert told.get("manifest", told)["schema"] == 1, (run, name)
    assert json.loads((OLD / "sweep/sweep.json").read_text())["schema"] == 1


def test_an_old_run_is_judged_and_reported(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in (RUNS[0], RUNS[-1]):
        assert said(capsys, "gate", old / run)[0] == 0
        assert said(capsys, "report", old / run)[0] == 0
        page = (old / run / "report.html").read_text()
        assert "INVALID" not in page
        assert "is missing" not in page


def test_old_runs_are_compared(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "compare", "--json", old / RUNS[0], old / RUNS[1])
    assert code == 0, text
    assert {row["metric"] for row in json.loads(text)["comparisons"][0]["differences"]} >= {"ttft_ms_p50"}
    code, text = said(capsys, "compare", f"{old}:ratio=1p1d", f"{old}:ratio=agg")
    assert code == 0, text


def test_an_old_sweep_is_reported(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "report", old)
    assert code == 0, text
    assert "1p1d" in (old / "report.html").read_text()


def test_an_old_sweep_goes_on(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (old / "journal.jsonl").read_text().splitlines(keepends=True)
    last = next(place for place, line in reversed(list(enumerate(lines))) if json.loads(line)["event"] == "started")
    (old / "journal.jsonl").write_text("".join(lines[:last]))
    words = ["sweep", OLD / "sweep.yml", "--resume", "--dry-run", "--output", old, "-i", OLD / "inventory"]
    code, text = said(capsys, *words)
    assert code == 0, text
    assert "3 of 4 are measured" in text


def test_old_runs_check_what_is_advised(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "advise", "--check", old, "--profile", "tiny", "--seeds", "2")
    assert code == 0, text
    assert "1p1d" in text


def test_an_old_plan_is_gone_on_from_on_its_inventory(tmp_path: Path) -> None:
    """Its workers stay where they are, and so do their ports."""
    run = OLD / "sweep" / next(run for run in RUNS if "1p1d" in str(run))
    env = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    command = [Path(sys.executable).with_name("ansible-playbook"), "plan.yml", "-i", OLD / "inventory"]
    command += ["-e", f"current_plan={run}/plan.json", "-e", f"plan_dir={tmp_path}"]
    done = subprocess.run(
        list(map(str, command)), cwd=REPO, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    was, now = (json.loads(path.read_text()) for path in (run / "plan.json", tmp_path / "plan.json"))
    places = [[(w["name"], r["host"], r["gpus"], r["port"]) for w in one["workers"] for r in w["ranks"]] for one in (was, now)]
    assert places[0] == places[1]


def test_an_old_manifest_is_one_that_bench_takes() -> None:
    for run in RUNS:
        settings.check_extra_vars(json.loads((OLD / "sweep" / run / "manifest.json").read_text()))


# -- a later checkout's


def later(path: Path) -> dict[str, Any]:
    """Make a file one of schema 2."""
    told = json.loads(path.read_text())
    told.get("manifest", told)["schema"] = 2
    path.write_text(json.dumps(told))
    return dict(told)


@pytest.mark.parametrize("name", NUMBERED)
def test_a_later_run_is_refused_in_words(name: str, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later(old / RUNS[0] / name)
    refused = f"{old / RUNS[0] / name}: it has schema 2, and this pdbench knows 1: use the checkout that wrote it, or a newer one"
    verbs: list[tuple[object, ...]] = [("report", old / RUNS[0])]
    # who judges anew, or compares, does not read what the others made of the run
    verbs += [("gate", old / RUNS[0])] if name != "validity.json" else []
    verbs += [("compare", old / RUNS[0], old / RUNS[1]), ("report", old)] if name not in ("run.json", "evidence.json") else []
    for words in verbs:
        code, text = said(capsys, *words)
        assert code == 1, (words, text)
        assert refused in text, words
        assert "Traceback" not in text


def test_a_later_sweep_is_refused_in_words(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later(old / "sweep.json")
    for words in (
        ("report", old),
        ("compare", old),
        ("advise", "--check", old, "--profile", "tiny"),
        ("sweep", OLD / "sweep.yml", "--resume", "--dry-run", "--output", old, "-i", OLD / "inventory"),
    ):
        code, text = said(capsys, *words)
        assert code in (1, 2), (words, text)
        assert "sweep.json: it has schema 2, and this pdbench knows 1" in text, words


def test_a_later_run_cannot_be_fitted(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later(old / RUNS[0] / "summary.json")
    code, text = said(capsys, "fit", old / RUNS[0], "--base", "tiny")
    assert code != 0
    assert "it has schema 2, and this pdbench knows 1" in text


def test_a_later_plan_or_manifest_is_refused_before_a_host_is_touched(old: Path, tmp_path: Path) -> None:
    content = later(old / RUNS[0] / "plan.json")
    with pytest.raises(UserError, match="there: it has schema 2, and this checkout knows 1: use the checkout that wrote it"):
        plan_file.parse(json.dumps(content), "there", "name another")
    deployed.store(str(tmp_path), content)
    with pytest.raises(UserError, match=r"plan\.json: it has schema 2, .*; teardown\.yml of all hosts removes it"):
        deployed.read(str(tmp_path))
    with pytest.raises(UserError, match=r"-e @manifest\.json: it has schema 2"):
        settings.check_extra_vars(later(old / RUNS[0] / "manifest.json"))


# -- the table


def test_the_page_names_every_file_with_a_number_and_who_writes_it() -> None:
    rows = re.findall(r"^\| .+? \| (\d+) \| (.+?) \|", (REPO / "docs" / "formats.md").read_text(), re.M)
    assert {number for number, _ in rows} == {"1"}
    listed = {path for _, cell in rows for path in re.findall(r"`([\w/]+\.py)`", cell)}
    sources = [path for folder in ("bench/pdbench", "library", "plugins") for path in (REPO / folder).rglob("*.py")]
    writers = {
        path.relative_to(REPO).as_posix() for path in sources if re.search(r'\{?"schema": (\d|\w*\.?SCHEMA)', path.read_text())
    }
    # it compares with a number that another has written
    assert listed == writers - {"plugins/action/pd_examine.py"}


def test_the_release_notes_begin_with_this_version() -> None:
    heads = re.findall(r"^## \[(.+?)\] - (\S+)$", (REPO / "CHANGELOG.md").read_text(), re.M)
    assert heads[0][0] == __version__
    assert heads[0][1] == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", heads[0][1])
