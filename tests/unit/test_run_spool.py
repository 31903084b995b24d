"""What senders spool is read back whole, in order and once, also while it is written and after a kill."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.records import Record
from pdbench.run import spool
from pdbench.run.digest import Raw
from pdbench.run.exchange import Exchange


def exchange(index: int, parts: list[bytes], sent: float = 2.5, error: str = "") -> Exchange:
    made = Exchange(index, 2.0)
    made.sent, made.ended, made.status, made.content_type, made.error = sent, 9.0, 200, "text/event-stream", error
    for number, part in enumerate(parts):
        made.parts.append(part)
        made.lengths.append(len(part))
        made.stamps.append(3.0 + number)
    return made


def write(writer: spool.Writer, index: int, parts: list[bytes], **more: float | str) -> None:
    made = exchange(index, list(parts), **more)  # type: ignore[arg-type]
    writer.write(Record(1, index, "measure", 5, 6), 1.5, "generate", made)
    assert made.parts == [], "the body is kept twice"


def content(raw: Raw) -> tuple[int, bytes, list[float], list[int]]:
    return raw.record.index, raw.body, list(raw.stamps), list(raw.lengths)


@given(st.lists(st.lists(st.binary(max_size=20), max_size=5), max_size=20), st.integers(1, 200))
def test_everything_comes_back_once_while_it_is_written(
    tmp_path_factory: pytest.TempPathFactory, bodies: list[list[bytes]], segment: int
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "_SEGMENT_BYTES", segment)
        writer, reader = spool.Writer(folder, 3), spool.Reader(folder, 3)
        found = []
        for index, parts in enumerate(bodies):
            write(writer, index, parts)
            if index % 3 == 0:
                found += [content(raw) for raw in reader.read()]
        found += [content(raw) for raw in reader.read()]
        writer.close()
    expected = [
        (i, b"".join(parts), [3.0 + n for n in range(len(parts))], [len(p) for p in parts]) for i, parts in enumerate(bodies)
    ]
    assert found == expected
    assert reader.count == writer.count == len(bodies)
    assert len(list(folder.iterdir())) == 1, "what was read takes no room"


def test_what_is_known_of_a_request_goes_with_it(tmp_path: Path) -> None:
    writer = spool.Writer(tmp_path, 0)
    write(writer, 7, [b"x"], error="reset")
    write(writer, 8, [], sent=math.nan, error="not connected")
    first, second = spool.Reader(tmp_path, 0).read()
    record = first.record
    assert (record.point, record.index, record.phase, record.prompt_tokens_asked, record.output_tokens_asked) == (
        1,
        7,
        "measure",
        5,
        6,
    )
    assert (record.scheduled_s, record.sent_s, first.start) == (0.5, 1.0, 1.5)
    assert (first.api, first.status, first.content_type, first.error) == ("generate", 200, "text/event-stream", "reset")
    assert math.isnan(second.record.sent_s)
    writer.close()


def test_a_frame_cut_short_by_a_kill_is_left_alone(tmp_path: Path) -> None:
    for sender in (0, 1):
        writer = spool.Writer(tmp_path, sender)
        write(writer, sender, [b"whole"])
        write(writer, sender + 10, [b"cut"])
        writer.close()
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert [raw.record.index for raw in spool.leftover(tmp_path)] == [0, 1]
    spool.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []
