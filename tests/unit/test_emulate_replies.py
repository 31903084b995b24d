from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pdbench.emulate.asks import Api, Ask, read
from pdbench.emulate.replies import Ending, Reply
from pdbench.emulate.stream import chunk

BODIES: dict[Api, dict[str, Any]] = {
    "generate": {"input_ids": [1, 2, 3]},
    "completions": {"prompt": [1, 2, 3]},
    "chat": {"messages": [{"role": "user", "content": "a b c"}]},
}


def ask(api: Api, **more: Any) -> Ask:
    return read(api, {**BODIES[api], **more}, 'mo"del', 10_000)


def ending(asked: Ask, tokens: int, place: int = 0, cached: int = 0, aborted: str = "") -> Ending:
    return Ending(asked.items[place].prompt.digest, tokens, cached, 0.5, aborted)


def streamed(asked: Ask, count: int, cached: int = 0) -> list[Any]:
    stream = Reply(asked).stream(0, asked.items[0].prompt.digest, cached)
    parts = [stream.token(index) for index in range(count - 1)]
    return parsed(b"".join([*parts, stream.last(ending(asked, count, cached=cached), True)]))


def parsed(raw: bytes) -> list[Any]:
    return [json.loads(part.removeprefix("data: ")) for part in raw.decode().split("\n\n") if part]


def unchunked(raw: bytes) -> list[bytes]:
    """Read chunks as RFC 9112 has them; whatever is left over or does not fit is an error."""
    parts = []
    while raw:
        size, _, rest = raw.partition(b"\r\n")
        length = int(size, 16)
        assert rest[length : length + 2] == b"\r\n"
        parts.append(rest[:length])
        raw = rest[length + 2 :]
    return parts


@given(st.binary(min_size=1, max_size=5000), st.binary(min_size=1, max_size=20))
def test_chunks_are_read_as_they_were_written(first: bytes, second: bytes) -> None:
    assert unchunked(chunk(first) + chunk(second)) == [first, second]


@given(
    st.sampled_from(sorted(BODIES)), st.integers(1, 40), st.binary(min_size=32, max_size=32), st.text(max_size=20), st.booleans()
)
def test_a_framed_stream_is_the_unframed_one_in_chunks(api: Api, count: int, digest: bytes, model: str, continuous: bool) -> None:
    """Whatever the lengths of names, numbers and texts: templates that are framed once fit every token."""
    asked = ask(api, model=model, rid="r", stream_options={"continuous_usage_stats": continuous})
    plain, framed = Reply(asked).stream(0, digest), Reply(asked, chunk).stream(0, digest)
    for index in range(count):
        assert b"".join(unchunked(framed.token(index))) == plain.token(index)
    for part in (framed.empty(), framed.error("why", 500), framed.last(ending(asked, count), True)):
        for event in unchunked(part):
            assert event.startswith(b"data: {")
            assert event.endswith(b"}\n\n")
            json.loads(event[6:])


@given(st.sampled_from(sorted(BODIES)), st.integers(1, 60), st.booleans(), st.integers(0, 3))
def test_tokens_in_are_tokens_out_streamed_or_not(api: Api, count: int, continuous: bool, cached: int) -> None:
    asked = ask(api, stream_options={"continuous_usage_stats": continuous})
    chunks = streamed(asked, count, cached)
    whole: Any = Reply(asked).whole([ending(asked, count, cached=cached)])
    if api == "generate":
        assert [chunk["meta_info"]["completion_tokens"] for chunk in chunks] == list(range(1, count + 1))
        assert [len(chunk["output_ids"]) for chunk in chunks] == list(range(1, count + 1))
        assert [chunk["meta_info"]["finish_reason"] for chunk in chunks[:-1]] == [None] * (count - 1)
        assert all(new["text"].startswith(old["text"]) for old, new in itertools.pairwise(chunks))
        last, other = chunks[-1], whole
        assert last == other
        assert {chunk["meta_info"]["cached_tokens"] for chunk in chunks} == {cached}
        assert last["meta_info"]["finish_reason"] == {"type": "length", "length": count}
        return
    if api == "chat":
        assert chunks.pop(0)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        finish = chunks.pop()["choices"][0]
        assert finish["delta"] == {}
        texts = [chunk["choices"][0]["delta"]["content"] for chunk in chunks]
        text = whole["choices"][0]["message"]["content"]
    else:
        finish = chunks[-1]["choices"][0]
        texts = [chunk["choices"][0]["text"] for chunk in chunks]
        text = whole["choices"][0]["text"]
    assert finish["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert "".join(texts) == text
    assert len(texts) == len(text.split()) == count == whole["usage"]["completion_tokens"]
    assert whole["usage"]["prompt_tokens"] == 3
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": cached}
    counted = [chunk["usage"]["completion_tokens"] if continuous else chunk["usage"] for chunk in chunks]
    assert counted == (list(range(1, count + 1)) if continuous else [None] * count)


def test_a_served_name_with_quotes_stays_json() -> None:
    assert streamed(ask("completions"), 2)[0]["model"] == 'mo"del'


def test_usage_event_has_no_choices() -> None:
    asked = ask("chat", stream_options={"include_usage": True})
    event, done = Reply(asked).end([ending(asked, 5)]).decode().split("\n\n", 1)
    assert json.loads(event.removeprefix("data: "))["choices"] == []
    assert json.loads(event.removeprefix("data: "))["usage"]["total_tokens"] == 8
    assert done == "data: [DONE]\n\n"
    assert Reply(asked).end(None) == Reply(ask("chat")).end([ending(asked, 5)]) == b"data: [DONE]\n\n"


def test_a_batch_of_generate_is_a_list_with_an_id_each() -> None:
    asked = read("generate", {"text": ["a", "b c"]}, "m", 1000)
    whole: Any = Reply(asked).whole([ending(asked, tokens, place) for place, tokens in enumerate((2, 3))])
    assert [part["meta_info"]["completion_tokens"] for part in whole] == [2, 3]
    assert [part["index"] for part in whole] == [0, 1]
    assert len({part["meta_info"]["id"] for part in whole}) == 2


@given(st.sampled_from(sorted(BODIES)), st.integers(0, 5))
def test_an_aborted_item_says_so_and_keeps_its_tokens(api: Api, count: int) -> None:
    asked = ask(api)
    cut = ending(asked, count, aborted="by hand")
    whole: Any = Reply(asked).whole([cut])
    stream = Reply(asked).stream(0, cut.digest)
    texts = b"".join(stream.token(index) for index in range(count))
    last = parsed(texts + stream.last(cut, False))[-1]
    if api == "generate":
        assert last == whole
        assert whole["meta_info"]["finish_reason"]["type"] == "abort"
        assert whole["meta_info"]["finish_reason"]["message"] == "by hand"
        assert len(whole["output_ids"]) == whole["meta_info"]["completion_tokens"] == count
    else:
        assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "abort"
        assert last["choices"][0].get("text", "") == ""
        assert whole["usage"]["completion_tokens"] == count


def test_an_input_is_judged_as_the_answer_to_what_comes_before() -> None:
    answer: Any = Reply(ask("generate", return_logprob=True)).whole([ending(ask("generate"), 3)])
    ids = answer["output_ids"]
    assert [row[:2] for row in answer["meta_info"]["output_token_logprobs"]] == [[0.0, id] for id in ids]
    other = (ids[1] + 1) % 4096
    judging = ask("generate", input_ids=[1, 2, 3, ids[0], other, ids[2]], return_logprob=True, logprob_start_len=2)
    meta: Any = Reply(judging).whole([ending(judging, 1)])
    rows, tops = (meta["meta_info"][name] for name in ("input_token_logprobs", "input_top_logprobs"))
    assert rows[0] == [None, 3, None]
    assert [row[1] for row in rows[1:]] == [ids[0], other, ids[2]]
    assert [row[0] == 0.0 for row in rows[1:]] == [True, False, True]
    assert rows[2][0] < -5
    assert tops == [None, *([[0.0, id, None]] for id in ids)]
