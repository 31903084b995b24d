"""From raw bytes to a record: every way a stream can be framed, and every way it can go wrong."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.records import Record
from pdbench.run.digest import Raw, to_record

START = 100.0


def sse(*messages: object) -> list[bytes]:
    return [b"data: " + (m if isinstance(m, bytes) else json.dumps(m).encode()) + b"\n\n" for m in messages]


def completion(text: str, total: int | None = None, finish: str | None = None) -> dict[str, object]:
    usage = {} if total is None else {"usage": {"prompt_tokens": 5, "completion_tokens": total}}
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], **usage}


def chat(delta: dict[str, object], total: int | None = None, finish: str | None = None) -> dict[str, object]:
    usage = {} if total is None else {"usage": {"prompt_tokens": 5, "completion_tokens": total}}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **usage}


def generated(text: str, total: int, finish: str | None = None, **more: object) -> dict[str, object]:
    reason = {"type": finish, "length": total} if finish else None
    meta = {"prompt_tokens": 5, "completion_tokens": total, "cached_tokens": 0, "finish_reason": reason}
    return {"text": text, "meta_info": meta, **more}


def usage(total: int, cached: int | None = None) -> dict[str, object]:
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": total, **details}}


DONE = b"[DONE]"


def digest(
    *parts: bytes, api: str = "completions", status: int = 200, kind: str = "text/event-stream; charset=utf-8", error: str = ""
) -> Record:
    """Digest reads that came 1 s apart, the first 1 s after sending."""
    record = Record(0, 3, "measure", 5, 3, scheduled_s=0.0, sent_s=0.0)
    stamps, lengths = [START + 1.0 + i for i in range(len(parts))], [len(part) for part in parts]
    return to_record(Raw(record, START, api, status, kind, stamps, lengths, b"".join(parts), error))[0]


def test_a_stream_with_counts_in_every_event() -> None:
    r = digest(*sse(completion(" a", 1), completion(" b", 2), completion(" c", 3, "length"), usage(3, cached=1), DONE))
    assert (r.ok, r.error, r.status, r.finish_reason) == (True, "", 200, "length")
    assert (r.first_s, r.end_s, r.chunk_s, r.chunk_tokens) == (1.0, 3.0, [1.0, 2.0, 3.0], [1, 1, 1])
    assert (r.prompt_tokens, r.output_tokens, r.cached_tokens) == (5, 3, 1)
    assert r.output_sha256 == hashlib.sha256(b" a b c").hexdigest()


def test_a_trailing_usage_chunk_is_no_output() -> None:
    r = digest(*sse(completion(" a"), completion(" b", finish="length"), usage(2), DONE))
    assert r.ok
    assert (r.end_s, r.chunk_tokens, r.output_tokens) == (2.0, [], 2)


def test_an_empty_first_chunk_is_not_the_first_token() -> None:
    r = digest(*sse(completion(""), completion(" a", finish="length"), DONE))
    assert (r.ok, r.first_s, r.chunk_s) == (True, 2.0, [2.0])


def test_a_role_chunk_is_not_the_first_token_even_with_usage() -> None:
    first = chat({"role": "assistant", "content": ""}, total=1)
    r = digest(*sse(first, chat({"content": " a"}, 1), chat({"content": " b"}, 2), chat({}, finish="length"), DONE), api="chat")
    assert (r.ok, r.first_s, r.end_s, r.chunk_tokens) == (True, 2.0, 3.0, [1, 1])


def test_reasoning_counts_as_output() -> None:
    r = digest(*sse(chat({"reasoning_content": "hm"}), chat({"content": "yes"}, finish="stop"), DONE), api="chat")
    assert (r.first_s, len(r.chunk_s)) == (1.0, 2)


def test_text_held_back_counts_when_the_server_counts_the_token() -> None:
    r = digest(*sse(completion("", 1), completion("é", 2, "length"), DONE))
    assert (r.first_s, r.chunk_tokens) == (1.0, [1, 1])


def test_several_events_in_one_read() -> None:
    r = digest(b"".join(sse(completion(" a", 1), completion(" b", 2), completion(" c", 3, "length"), DONE)))
    assert (r.ok, r.chunk_s, r.chunk_tokens) == (True, [1.0, 1.0, 1.0], [1, 1, 1])


def test_several_tokens_in_one_event() -> None:
    r = digest(*sse(completion(" a", 1), completion(" b c", 3, "length"), DONE))
    assert r.chunk_tokens == [1, 2]


def test_generate_cumulative_and_incremental_give_the_same() -> None:
    whole = digest(*sse(generated(" a", 1), generated(" a b", 2, "length"), DONE), api="generate")
    parts = digest(*sse(generated(" a", 1, output_ids=[7]), generated(" b", 2, "length", output_ids=[8]), DONE), api="generate")
    assert (whole.ok, whole.chunk_tokens, whole.output_tokens, whole.prompt_tokens) == (True, [1, 1], 2, 5)
    assert whole.output_sha256 == parts.output_sha256
    assert parts.chunk_tokens == [1, 1]


def test_generate_without_a_tokenizer_sends_ids_alone() -> None:
    r = digest(*sse(generated("", 1, output_ids=[7]), generated("", 2, "length", output_ids=[7, 8]), DONE), api="generate")
    assert (r.ok, r.chunk_s, r.chunk_tokens) == (True, [1.0, 2.0], [1, 1])
    assert r.output_sha256 == hashlib.sha256(b"[7, 8]").hexdigest()


def test_no_done_after_a_finish_reason_is_complete() -> None:
    assert digest(*sse(completion(" a", 1, "length"))).ok


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        (sse(completion(" a", 1), {"error": {"message": "out of memory"}}), "error event: out of memory"),
        ([*sse(completion(" a", 1)), b'event: error\ndata: {"message": "gone"}\n\n'], "error event: gone"),
        (sse(completion(" a", 1)), "truncated: the stream ended without a finish reason or [DONE]"),
        ([*sse(completion(" a", 1)), b'data: {"choi'], "truncated: the stream ended without a finish reason or [DONE]"),
        (sse(usage(0), DONE), "no output: the stream held no token"),
        ([], "truncated: the stream ended without a finish reason or [DONE]"),
        (sse(completion(" a", 1, "abort"), DONE), "the server ended the answer with finish_reason abort"),
        (sse(b"not json", DONE), "an event that is no JSON: not json"),
        (sse([1, 2], DONE), "an event that is no JSON object: [1, 2]"),
        (sse({"choices": [3]}, DONE), 'an event of unknown shape: {"choices": [3]}'),
        (sse({"choices": "x"}, DONE), 'an event of unknown shape: {"choices": "x"}'),
    ],
)
def test_a_bad_stream_fails(reads: list[bytes], expected: str) -> None:
    r = digest(*reads)
    assert (r.ok, r.error) == (False, expected)


def test_what_came_before_an_error_stays_on_record() -> None:
    r = digest(*sse(completion(" a", 1), {"error": {"message": "x"}}))
    assert (r.first_s, r.chunk_s) == (1.0, [1.0])


def test_a_broken_connection_fails_even_when_events_came() -> None:
    r = digest(*sse(completion(" a", 1)), error="truncated: the connection ended before the response did")
    assert (r.ok, r.error) == (False, "truncated: the connection ended before the response did")


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (503, b'{"error":{"message":"no workers","code":503}}', "HTTP 503: no workers"),
        (503, b"", "HTTP 503"),
        (422, b"Failed to deserialize", "HTTP 422: Failed to deserialize"),
        (200, b'{"error":{"message":"bad room"}}', "HTTP 200 with an error: bad room"),
        (200, b'{"object":"error","message":"bad model"}', "HTTP 200 with an error: bad model"),
    ],
)
def test_a_refusal(status: int, body: bytes, expected: str) -> None:
    r = digest(body, status=status, kind="application/json")
    assert (r.ok, r.error, r.status) == (False, expected, status)
    assert math.isnan(r.first_s)
    assert math.isnan(r.end_s)


def test_an_answer_that_is_not_streamed_has_no_times() -> None:
    r = digest(b'{"choices":[{"text":" a b"}]}', kind="application/json")
    assert not r.ok
    assert r.error.startswith("not streamed")
    assert math.isnan(r.first_s)


def test_half_a_surrogate_reaches_no_file() -> None:
    r = digest(b'{"error":{"message":"\\ud800"}}', status=500, kind="application/json")
    assert r.to_line().encode()
    r.error.encode()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=20), st.data())
def test_tokens_are_conserved_however_events_are_cut(tokens: list[int], data: st.DataObject) -> None:
    totals = [sum(tokens[: i + 1]) for i in range(len(tokens))]
    last = len(tokens) - 1
    body = b"".join(sse(*(completion(" x" * n, t, "length" if i == last else None)
                          for i, (n, t) in enumerate(zip(tokens, totals, strict=True))), usage(totals[-1]), DONE))  # fmt: skip
    at = sorted(data.draw(st.lists(st.integers(1, len(body) - 1), max_size=30, unique=True)))
    parts = [body[a:b] for a, b in zip([0, *at], [*at, len(body)], strict=True)]
    r = digest(*parts)
    assert r.ok
    assert sum(r.chunk_tokens) == r.output_tokens == totals[-1]
    assert r.chunk_tokens == tokens
    assert r.chunk_s == sorted(r.chunk_s)
    assert r.first_s <= r.end_s
