"""Records keep what they hold through both files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.records import Record, read_jsonl, read_parquet, replacing, schema, write_json, write_parquet

TIMES = st.floats(0, 1e6).map(lambda t: round(t, 9)) | st.just(math.nan)


@given(
    TIMES, st.lists(st.floats(0, 1e5).map(lambda t: round(t, 9)), max_size=5), st.text(st.characters(codec="utf-8"), max_size=20)
)
def test_a_line_holds_the_record(first: float, chunks: list[float], error: str) -> None:
    record = Record(1, 2, "measure", 5, 6, first_s=first, chunk_s=chunks, chunk_tokens=[1] * len(chunks), error=error)
    line = record.to_line()
    assert line.count("\n") == 1
    back = Record.from_mapping(json.loads(line))
    assert repr(back) == repr(record)


def test_parquet_holds_the_records_in_order(tmp_path: Path) -> None:
    made = [Record(1, 0, "measure", 5, 6), Record(0, 1, "measure", 5, 6, chunk_s=[0.5], ok=True), Record(0, 0, "warmup", 5, 6)]
    write_parquet(tmp_path / "r.parquet", made)
    assert [repr(r) for r in read_parquet(tmp_path / "r.parquet")] == [repr(made[i]) for i in (2, 1, 0)]
    assert pq.read_schema(tmp_path / "r.parquet").equals(schema())
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]


def test_an_empty_run_is_a_file_with_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "r.parquet", [])
    assert read_parquet(tmp_path / "r.parquet") == []


def test_a_line_cut_by_a_crash_is_dropped_and_a_bad_one_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    line = Record(0, 0, "measure", 5, 6).to_line()
    path.write_text(line + line[:40])
    assert len(list(read_jsonl(path))) == 1
    path.write_text(line + "{}\n")
    with pytest.raises(ValueError, match="line 2"):
        list(read_jsonl(path))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": math.nan})
    with pytest.raises(UnicodeEncodeError), replacing(path) as temporary:
        temporary.write_text("\ud800")
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
