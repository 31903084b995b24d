"""Server-sent events: wherever the network cuts, the same events are read."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pdbench.run import sse
from pdbench.run.sse import Event

STREAM = (
    ': a comment\n\ndata: {"text":"é€🙂"}\n\nevent: note\r\ndata: one\r\ndata: two\r\n\r\n'
    "id: 7\nretry: 5\n\ndata:no blank\r\rdata: [DONE]\n\n"
).encode()
EXPECTED = [("", '{"text":"é€🙂"}'), ("note", "one\ntwo"), ("", "no blank"), ("", "[DONE]")]


def cut(stream: bytes, at: list[int]) -> list[tuple[float, bytes]]:
    places = sorted({0, *(p for p in at if p < len(stream)), len(stream)})
    return [(float(i), stream[a:b]) for i, (a, b) in enumerate(itertools.pairwise(places))]


def events(reads: list[tuple[float, bytes]]) -> list[Event]:
    return sse.events(b"".join(part for _, part in reads), [at for at, _ in reads], [len(part) for _, part in reads])


def said(found: list[Event]) -> list[tuple[str, str]]:
    return [(e.name, e.data.decode()) for e in found]


@given(st.lists(st.integers(0, len(STREAM)), max_size=60))
def test_any_cut_gives_the_same_events(at: list[int]) -> None:
    assert said(events(cut(STREAM, at))) == EXPECTED


@given(st.lists(st.integers(0, len(STREAM)), max_size=60))
def test_an_event_arrives_with_the_read_that_completes_it(at: list[int]) -> None:
    reads = cut(STREAM, at)
    found = events(reads)
    for event in found:
        upto = b"".join(part for _, part in reads[: event.read + 1])
        before = b"".join(part for _, part in reads[: event.read])
        assert event.time_s == reads[event.read][0]
        number = found.index(event) + 1
        assert len([e for e in events([(0.0, upto)]) if e.whole]) >= number
        assert len([e for e in events([(0.0, before)]) if e.whole]) < number
    assert [e.time_s for e in found] == sorted(e.time_s for e in found)


@given(
    st.lists(st.sampled_from([b"data: a", b"data:b", b"\n", b"\n\n", b": c", b"event: e", b"data: ", b"x"]), max_size=30),
    st.data(),
)
def test_both_ways_read_the_same(parts: list[bytes], data: st.DataObject) -> None:
    body = b"".join(parts)
    reads = cut(body, data.draw(st.lists(st.integers(0, 60), max_size=10)))
    ends = [sum(len(part) for _, part in reads[: k + 1]) for k in range(len(reads))]
    stamps = [at for at, _ in reads]
    assert sse._line_feeds(body, stamps, ends) == sse._any_line_ends(body, stamps, ends)


def test_byte_by_byte() -> None:
    assert said(events([(float(i), STREAM[i : i + 1]) for i in range(len(STREAM))])) == EXPECTED


def test_what_is_left_without_a_blank_line_is_not_whole() -> None:
    found = events([(0.0, b"data: a\n\ndata: b"), (1.0, b"c")])
    assert [(e.data, e.whole, e.time_s) for e in found] == [(b"a", True, 0.0), (b"bc", False, 1.0)]


def test_nothing_in_nothing_out() -> None:
    assert events([]) == []
    assert events([(0.0, b"\n\n: only\n\nevent: x\n\n")]) == []
