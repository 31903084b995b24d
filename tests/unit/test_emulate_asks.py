from __future__ import annotations

from typing import Any

import pytest

from pdbench.emulate.asks import Api, Ask, BadAskError, read
from pdbench.emulate.text import encode, prompt_of


def asked(api: Api, **body: Any) -> Ask:
    return read(api, body, "served", 1000)


def chat(*contents: Any, **body: Any) -> Ask:
    return asked("chat", messages=[{"role": "user", "content": content} for content in contents], **body)


def test_text_ids_and_chat_of_the_same_words_are_the_same_prompt() -> None:
    wanted = prompt_of(encode("a b c"))
    asks = [
        asked("completions", prompt="a b c"),
        asked("completions", prompt=encode("a b c")),
        asked("generate", text="a b c"),
        asked("generate", input_ids=encode("a b c")),
        chat("a b c"),
        chat("a", [{"type": "text", "text": "b c"}]),
    ]
    assert [ask.items[0].prompt for ask in asks] == [wanted] * len(asks)
    assert not any(ask.batch for ask in asks)


def test_lists_of_prompts() -> None:
    for ask in (
        asked("completions", prompt=["a b", "c"]),
        asked("completions", prompt=[[1, 2], [3]]),
        asked("generate", text=["a b", "c"]),
        asked("generate", input_ids=[[1, 2], [3]]),
    ):
        assert [item.prompt.tokens for item in ask.items] == [2, 1]
        assert ask.batch


@pytest.mark.parametrize(
    ("ask", "tokens"),
    [
        (asked("completions", prompt="a"), 16),
        (asked("completions", prompt="a", max_tokens=3), 3),
        (asked("generate", text="a"), 128),
        (asked("generate", text="a", sampling_params={"max_new_tokens": 7, "ignore_eos": True}), 7),
        (chat("a"), 128),
        (chat("a", max_tokens=4), 4),
        (chat("a", max_tokens=4, max_completion_tokens=5, min_tokens=5, ignore_eos=True), 5),
    ],
)
def test_output_length(ask: Ask, tokens: int) -> None:
    assert ask.items[0].output_tokens == tokens


def test_stream_options() -> None:
    ask = chat("a", stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert (ask.stream, ask.include_usage, ask.continuous_usage) == (True, True, True)
    assert (chat("a").stream, chat("a", stream_options=None).include_usage) == (False, False)


def test_bootstrap_fields_of_one_and_of_many() -> None:
    item = chat("a", bootstrap_host="h", bootstrap_port=None, bootstrap_room=2**63 - 1).items[0]
    assert (item.bootstrap_host, item.bootstrap_port, item.bootstrap_room) == ("h", None, 2**63 - 1)
    lists = asked("completions", prompt=["a", "b"], bootstrap_host=["h", "i"], bootstrap_port=[1, None], bootstrap_room=[5, 9])
    assert [(i.bootstrap_host, i.bootstrap_port, i.bootstrap_room) for i in lists.items] == [("h", 1, 5), ("i", None, 9)]
    one = asked("generate", text=["a", "b"], bootstrap_host="h", bootstrap_room=5)
    assert [item.bootstrap_room for item in one.items] == [5, 6]


def test_rids_name_every_prompt() -> None:
    assert asked("generate", text="a", rid="mine").items[0].rid == "mine"
    assert [item.rid for item in asked("generate", text=["a", "b"], rid="mine").items] == ["mine_0", "mine_1"]
    assert [item.rid for item in asked("generate", text=["a", "b"], rid=["x", "y"]).items] == ["x", "y"]
    made = [item.rid for item in asked("completions", prompt=["a", "b"]).items]
    assert len({*made, chat("a").items[0].rid}) == 3
    assert all(made)


@pytest.mark.parametrize(
    ("api", "body", "said"),
    [
        ("completions", [], "JSON object"),
        ("completions", {}, "prompt is missing"),
        ("completions", {"prompt": ""}, "the prompt is empty"),
        ("completions", {"prompt": []}, "prompt must be text, token ids"),
        ("completions", {"prompt": [1, "a"]}, "prompt must be text, token ids"),
        ("completions", {"prompt": [True]}, "prompt must be text, token ids"),
        ("completions", {"prompt": [-1]}, "between 0 and"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ("completions", {"prompt": "a", "max_tokens": "5"}, "max_tokens must be at least 1, got '5'"),
        ("completions", {"prompt": "a", "max_tokens": 5, "min_tokens": 6}, "min_tokens must be in"),
        ("completions", {"prompt": "a", "max_tokens": 1000}, "maximum context length of 1000"),
        ("completions", {"prompt": "a", "n": 2}, "n must be 1"),
        ("completions", {"prompt": "a", "stream": "yes"}, "stream must be true or false"),
        ("completions", {"prompt": "a", "stream_options": 1}, "stream_options must be an object"),
        ("completions", {"prompt": "a", "bootstrap_room": "x"}, "bootstrap_room must be a whole number, not 'x'"),
        ("completions", {"prompt": "a", "bootstrap_port": 70000}, "bootstrap_port must be between 1 and 65535"),
        ("completions", {"prompt": "a", "bootstrap_host": 1}, "bootstrap_host must be text"),
        ("completions", {"prompt": ["a", "b"], "bootstrap_room": [1]}, "bootstrap_room has 1 entries for 2 prompts"),
        ("completions", {"prompt": "a", "rid": 5}, "rid must be text, not 5"),
        ("generate", {}, "either text or input_ids"),
        ("generate", {"text": "a", "input_ids": [1]}, "either text or input_ids"),
        ("generate", {"text": "a", "sampling_params": [1]}, "sampling_params must be an object"),
        ("generate", {"text": "a", "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens must be at least 1"),
        ("chat", {"messages": []}, "messages must be"),
        ("chat", {"messages": ["hi"]}, "a message must be an object"),
        ("chat", {"messages": [{"role": "user", "content": 3}]}, "content must be text"),
    ],
)
def test_bad_bodies(api: Api, body: object, said: str) -> None:
    with pytest.raises(BadAskError) as caught:
        read(api, body, "served", 1000)
    assert said in str(caught.value)


def test_log_probabilities_are_told_from_a_place_on() -> None:
    assert not asked("generate", input_ids=[1, 2, 3]).items[0].logprobs
    (item,) = asked("generate", input_ids=[1, 2, 3], return_logprob=True).items
    assert (item.logprobs, item.scored_ids) == (True, ())
    (item,) = asked("generate", input_ids=[1, 2, 3, 4], return_logprob=True, logprob_start_len=1).items
    assert (item.scored_ids, item.scored_digest) == ((2, 3, 4), prompt_of([1, 2]).digest)
    for start in (4, -2, "1", True, 1.0):
        with pytest.raises(BadAskError, match="logprob_start_len must be a whole number below the prompt's 4 tokens"):
            asked("generate", input_ids=[1, 2, 3, 4], return_logprob=True, logprob_start_len=start)
