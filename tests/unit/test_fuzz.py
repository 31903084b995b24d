"""A little of what `make fuzz` does at length, the same inputs in every run; and by name what it has found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fuzz import QUICK, SURFACES, __main__, law
from fuzz.planning import planned
from fuzz.wires import digested, raw
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pdbench.importing.formats import BadFile
from pdbench.importing.formats import read as read_result
from pdbench.load.errors import LoadError
from pdbench.load.lengths import Lengths
from pdbench.load.trace import Scaling, read_trace
from pdbench.model import profile
from pdbench.records import read_parquet
from pdbench.shapes import SUMMARY, wrong
from pdbench.sweep import journal
from pdlib import plan_file
from pdlib.errors import UserError

#: inputs of a surface; those that plan, or copy and judge a run's folder, take longer
FEW = {
    **dict.fromkeys(("inventory", "extra_vars"), 12),
    **dict.fromkeys(("good_spellings", "export", "merged"), 4),
    **{"import_command": 3, "compare": 2, "compare_sweep": 2},
}
HOST = {"engine": "emulated", "address": "127.0.0.1", "gpus": 2, "rdma_fabric": "none", "service_manager": "systemd"}


@pytest.mark.parametrize("name", QUICK)
def test_bad_input_is_refused_in_words_and_good_input_is_not(name: str) -> None:
    @settings(
        derandomize=True, database=None, deadline=None, max_examples=FEW.get(name, 8), phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        QUICK[name](data)

    tried()


def test_the_law_is_broken_by_a_traceback_a_hang_and_a_message_that_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        law.read(lambda: 1 // 0, LoadError)
    with pytest.raises(law.BrokenLawError, match="names none of trace"):
        law.read(lambda: Lengths.parse("x"), LoadError, "trace.jsonl")
    with pytest.raises(law.BrokenLawError, match="exit code 2, not one of"):
        law.command(["no-such-verb"], (0, 1))

    def endless() -> None:
        while True:
            pass

    monkeypatch.setattr(law, "_LONGEST_S", 0.05)
    with pytest.raises(law.BrokenLawError, match="no end after"):
        law.read(endless, LoadError)


def test_the_fuzzer_prints_seed_and_smallest_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def faulty(data: st.DataObject) -> None:
        assert data.draw(st.integers(0, 1000)) < 30

    monkeypatch.setitem(SURFACES, "faulty", faulty)
    monkeypatch.setattr("sys.argv", ["fuzz", "--minutes", "0.005", "--seed", "7", "--only", "faulty"])
    assert __main__.main() == 1
    said = capsys.readouterr().out
    assert said.startswith("seed 7\n")
    assert "faulty, --seed 7 --only faulty" in said
    assert "Draw 1: 30" in said


DEEP = "[" * 100_000


def test_nested_too_deep_is_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(DEEP)
    with pytest.raises(LoadError, match=r"t\.jsonl, line 1"):
        read_trace(path, Scaling())
    with pytest.raises(profile.ProfileError, match="nested too deep"):
        profile.parse(DEEP, "p.yml")
    with pytest.raises(UserError, match=r"plan\.json is not a plan \(it is nested too deep\): right"):
        plan_file.parse(DEEP, "plan.json", "right")
    # It took the digester with it, and so the run.
    record = digested(raw("chat", b"data: " + DEEP.encode() + b"\n\n", []))
    assert record.error.startswith("an event that is no JSON")


def test_numbers_beyond_64_bits(tmp_path: Path) -> None:
    huge = 10**400
    (tmp_path / "t.jsonl").write_text(json.dumps({"timestamp": huge, "input_length": 1, "output_length": 1}))
    with pytest.raises(LoadError, match="line 1"):
        read_trace(tmp_path / "t.jsonl", Scaling())
    (tmp_path / "r.jsonl").write_text(json.dumps({"duration": huge}))
    with pytest.raises(BadFile, match=r"r\.jsonl, line 1"):
        read_result(tmp_path / "r.jsonl")
    with pytest.raises(LoadError, match="no length in tokens"):
        Lengths.parse("9" * 5000)
    with pytest.raises(UserError, match=r"mem_fraction=.* expected a number"):
        _refused(mem_fraction=huge)


def _refused(**extra: object) -> None:
    from ansible.errors import AnsibleActionFail

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(law, "read", lambda call, *_: call())
        try:
            planned({"h0": dict(HOST)}, dict(extra))
        except AnsibleActionFail as error:
            raise UserError(str(error)) from None


def test_lists_hold_words_and_text_can_be_written() -> None:
    with pytest.raises(UserError, match=r"engine_files=\[None\] \(-e\): expected a list of words"):
        _refused(engine_files=[None])
    with pytest.raises(UserError, match=r"model \(-e\): it holds a character that no file or command line can"):
        _refused(model="\ud800")
    with pytest.raises(UserError, match=r"engine_env \(-e\): it holds a character"):
        _refused(engine_env={"A": ["x\0"]})
    with pytest.raises(UserError, match=r"\.\.\. \(\d{4} characters\) one of sglang-router, smg"):
        _refused(router="x" * 5000)


def test_a_damaged_deployed_plan_is_named_with_the_field(tmp_path: Path) -> None:
    good = {"ratio": "agg", "router": {"host": "h0"}, "workers": [
        {"name": "aggregated-0", "role": "aggregated", "url": "http://127.0.0.1:1", "ranks": [
            {"host": "h0", "gpus": [0], "argv": [], "env": {}, "unit": "u"}]}]}  # fmt: skip
    assert plan_file.parse(json.dumps(good), "p", "") == good
    good["workers"][0]["ranks"][0]["gpus"] = ["x"]  # type: ignore[index]
    (tmp_path / "plan.json").write_text(json.dumps(good))
    with pytest.raises(
        UserError, match=r"plan\.json is not a plan \(workers\[0\]\.ranks\[0\]\.gpus\[0\] is 'x', and should be a whole"
    ):
        _refused(current_plan=str(tmp_path / "plan.json"))


@pytest.mark.parametrize("line", ["null", "[]", '{"event": 3}', '{"event": "finished"}', '{"event": "failed", "cell": "a"}'])
def test_a_journal_s_line_that_is_no_event_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / journal.JOURNAL).write_text(line + "\n")
    with pytest.raises(UserError, match=r"line 1: no event of a sweep .* take the line out"):
        journal.Journal(tmp_path)


def test_shapes_say_where_and_what() -> None:
    assert wrong({"ttft_ms": {"mean": 1, "p99": None}, "of_a_later_version": [3]}, SUMMARY) == ""
    assert wrong({"points": [{}, {"completed": True}]}, SUMMARY) == "points[1].completed is True, and should be a whole number"
    assert wrong({"duration_s": float("nan")}, SUMMARY) == "duration_s is nan, and should be a number"


def test_columns_of_another_type_are_named(tmp_path: Path) -> None:
    import pandas as pd

    pd.DataFrame({"point": ["x"], "phase": [1]}).to_parquet(tmp_path / "r.parquet")
    with pytest.raises(ValueError, match="the column point is"):
        read_parquet(tmp_path / "r.parquet")
