from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pdbench.emulate.asks import Api, Ask, read
from pdbench.emulate.replies import Reply

BODIES: dict[Api, dict[str, Any]] = {
    "generate": {"input_ids": [1, 2, 3]},
    "completions": {"prompt": [1, 2, 3]},
    "chat": {"messages": [{"role": "user", "content": "a b c"}]},
}


def ask(api: Api, **more: Any) -> Ask:
    return read(api, {**BODIES[api], **more}, 'mo"del', 10_000)


def streamed(asked: Ask, count: int) -> list[Any]:
    stream = Reply(asked).stream(0, asked.items[0].prompt.digest)
    raw = b"".join(stream.token(index, index == count - 1, 0.5) for index in range(count)).decode()
    return [json.loads(part.removeprefix("data: ")) for part in raw.split("\n\n") if part]


@given(st.sampled_from(sorted(BODIES)), st.integers(1, 60), st.booleans())
def test_tokens_in_are_tokens_out_streamed_or_not(api: Api, count: int, continuous: bool) -> None:
    asked = ask(api, stream_options={"continuous_usage_stats": continuous})
    chunks = streamed(asked, count)
    whole: Any = Reply(asked).whole([asked.items[0].prompt.digest], [count], [0.5])
    if api == "generate":
        assert [chunk["meta_info"]["completion_tokens"] for chunk in chunks] == list(range(1, count + 1))
        assert [len(chunk["output_ids"]) for chunk in chunks] == list(range(1, count + 1))
        assert [chunk["meta_info"]["finish_reason"] for chunk in chunks[:-1]] == [None] * (count - 1)
        assert all(new["text"].startswith(old["text"]) for old, new in itertools.pairwise(chunks))
        last, other = chunks[-1], whole
        last["meta_info"].pop("id"), other["meta_info"].pop("id")
        assert last == other
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
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    counted = [chunk["usage"]["completion_tokens"] if continuous else chunk["usage"] for chunk in chunks]
    assert counted == (list(range(1, count + 1)) if continuous else [None] * count)


def test_a_served_name_with_quotes_stays_json() -> None:
    assert streamed(ask("completions"), 2)[0]["model"] == 'mo"del'


def test_usage_event_has_no_choices() -> None:
    event = json.loads(Reply(ask("chat")).usage_event([5]).decode().removeprefix("data: "))
    assert event["choices"] == []
    assert event["usage"]["total_tokens"] == 8


def test_a_batch_of_generate_is_a_list_with_an_id_each() -> None:
    asked = read("generate", {"text": ["a", "b c"]}, "m", 1000)
    whole: Any = Reply(asked).whole([item.prompt.digest for item in asked.items], [2, 3], [0.1, 0.2])
    assert [part["meta_info"]["completion_tokens"] for part in whole] == [2, 3]
    assert [part["index"] for part in whole] == [0, 1]
    assert len({part["meta_info"]["id"] for part in whole}) == 2
