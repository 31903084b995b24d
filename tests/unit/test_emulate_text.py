from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.emulate.text import VOCABULARY_SIZE, WORD_BYTES, WORD_LENGTH, Output, encode, prompt_of, word


@given(st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=16)))
def test_a_short_word_is_a_token(words: list[str]) -> None:
    assert len(encode(" ".join(words))) == len(words)


def test_a_long_word_is_cut() -> None:
    assert len(encode("x" * 33)) == 3
    assert encode("") == []


def test_any_text_can_be_encoded() -> None:
    prompt_of(encode("\ud800 é 漢字 \0"))


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1), st.integers(0, 200))
def test_tokens_out_are_tokens_in_again(ids: list[int], count: int) -> None:
    output = Output(prompt_of(ids).digest)
    tokens = [output.token(index) for index in range(count)]
    assert all(0 <= token < VOCABULARY_SIZE for token in tokens)
    assert len(encode("".join(map(word, tokens)))) == count


def test_output_is_the_same_in_every_process_and_version() -> None:
    output = Output(prompt_of(encode("a b c d")).digest)
    assert "".join(word(output.token(index)) for index in range(4)) == " powe noka foja keve"


@given(st.lists(st.integers(0, 1000), min_size=1, unique=True))
def test_another_prompt_has_another_digest_and_output(ids: list[int]) -> None:
    one, other = prompt_of(ids), prompt_of([*ids, 1])
    assert one.digest != other.digest
    first, second = Output(one.digest), Output(other.digest)
    assert [first.token(i) for i in range(20)] != [second.token(i) for i in range(20)]


def test_all_words_differ() -> None:
    words = [word(token) for token in range(VOCABULARY_SIZE)]
    assert len(set(words)) == VOCABULARY_SIZE
    assert [text.encode() for text in words] == WORD_BYTES
    assert {len(text) for text in words} == {WORD_LENGTH}


@pytest.mark.parametrize("ids", [[-1], [2**31], [2**70]])
def test_impossible_token_ids_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="token ids must be"):
        prompt_of(ids)
