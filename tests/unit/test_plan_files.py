"""Files that a plan ships, and those that plan.yml writes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.plans import Json, host, plan

from pdlib import plan_files
from pdlib.errors import UserError


def made(ratio: str = "1p1d", *files: str) -> Json:
    return plan({"n1": host(1)}, ratio, engine_files=list(files))


def test_a_folder_has_what_the_last_plan_wrote_and_what_was_there_of_others(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a note")
    assert plan_files.write(tmp_path, made("2p1d"))[0]
    again, count = plan_files.write(tmp_path, made("2p1d"))
    assert (again, count) == (False, len(list((tmp_path / "n1").iterdir())))
    assert plan_files.write(tmp_path, made("1p1d"))[0]
    names = {path.name for path in (tmp_path / "n1").iterdir()}
    assert any("prefill-0" in name for name in names)
    assert not any("prefill-1" in name for name in names)
    assert (tmp_path / "mine.txt").read_text() == "a note"


def test_a_plan_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"name": "summer"}')
    with pytest.raises(UserError, match=r"it is no earlier plan of ours; name another plan_dir"):
        plan_files.write(tmp_path, made())
    assert (tmp_path / "plan.json").read_text() == '{"name": "summer"}'


def test_files_that_cannot_be_shipped_are_refused(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text("{}")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    plan_files.check(made("1p1d", "good.json"), tmp_path)
    for files, why in (
        (["bytes.json"], "which is not text"),
        (["nothing.json"], "No such file"),
        (["good.json", "other/good.json"], "two files of the name good.json"),
    ):
        with pytest.raises(UserError, match=why):
            plan_files.check(made("1p1d", *files), tmp_path)


def test_a_lock_is_of_what_the_engine_is_installed_from(tmp_path: Path) -> None:
    (tmp_path / "requirements").mkdir()
    lock = tmp_path / "requirements" / "pdbench-emulate.txt"
    lock.write_text("one==1")
    first = plan_files.locks(made(), tmp_path)
    assert set(first) == {"n1"}
    assert plan_files.locks(made("2p1d"), tmp_path) == first
    lock.write_text("one==2")
    assert plan_files.locks(made(), tmp_path) != first
