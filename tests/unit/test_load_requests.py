"""Which requests a load point is made of: traces, system prompts, conversations, and the bodies that they become."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdbench.load.errors import LoadError
from pdbench.load.lengths import Lengths
from pdbench.load.prompts import Prompts
from pdbench.load.requests import Conversation, Load, Prefix, Request
from pdbench.load.trace import BLOCK, Scaling, read_trace
from pdbench.run.asks import ask
from pdbench.run.bodies import Bodies, Target, Template

EXCERPT = Path(__file__).resolve().parents[1] / "data" / "mooncake_excerpt.jsonl"
TOKENS = Target("completions", "tokens", "m")


def load(**changes: object) -> Load:
    lengths = {"isl": Lengths.parse("20-40"), "osl": Lengths.parse("5")}
    return Load(**{**lengths, "count": 30, "seed": 7, "concurrency": 4, **changes})  # type: ignore[arg-type]


def bodies(requests: list[Request], target: Target = TOKENS, number: int = 0, serial: int = 0, **options: int) -> Bodies:
    return Bodies.make(target, Prompts(3, **options), number, serial, {"warmup": requests[:2], "measure": requests})  # type: ignore[arg-type]


def prompts_of(requests: list[Request], number: int = 0) -> list[list[int]]:
    made = bodies(requests, number=number).measure
    found = [json.loads(body)["prompt"] for body in made if isinstance(body, bytes)]
    assert [len(prompt) for prompt in found] == [request.isl for request in requests]
    return found


def shared(one: list[int], two: list[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


def test_the_excerpt_reads_as_a_trace() -> None:
    rows = read_trace(EXCERPT, Scaling())
    assert len(rows) == 200
    assert (rows[0].arrival_s, rows[0].isl, rows[0].osl) == (0.0, 6758, 500)
    assert rows[-1].arrival_s == 72.0
    assert [r.arrival_s for r in rows] == sorted(r.arrival_s for r in rows)


def test_scaling_cuts_and_never_reaches_zero() -> None:
    small = read_trace(EXCERPT, Scaling(0.001, max_isl=50, max_osl=4), 20)
    assert len(small) == 20
    assert all(1 <= r.isl <= 50 and 1 <= r.osl <= 4 for r in small)
    assert small[0].isl == 7


def test_replay_multiplies_the_times() -> None:
    rows = read_trace(EXCERPT, Scaling())
    half = Load(None, None, 200, 0, rows, replay=0.5).measured()
    assert half[-1].due_s == 36.0
    assert [(r.isl, r.osl) for r in half] == [(r.isl, r.osl) for r in rows]


LINE = {"timestamp": 5, "input_length": 10, "output_length": 2, "hash_ids": []}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no request"),
        ("hello\n", "line 1: not a line of a Mooncake trace"),
        ("[1]\n", "line 1: not a line"),
        (json.dumps({**LINE, "input_length": "10"}), "whole numbers"),
        (json.dumps({**LINE, "output_length": -1}), "whole numbers"),
        (json.dumps({**LINE, "timestamp": None}), "number of ms"),
        (json.dumps(LINE) + "\n" + json.dumps({**LINE, "timestamp": 1}), "line 2: its timestamp is before"),
        (json.dumps(LINE), "fewer than --num-requests 2"),
    ],
)
def test_a_bad_trace_is_named_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(LoadError, match=expected):
        read_trace(path, Scaling(), 2)


def test_a_missing_or_binary_trace_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot read the trace"):
        read_trace(tmp_path / "none", Scaling())
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoadError, match="no text file"):
        read_trace(tmp_path / "b", Scaling())


HASHES = st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=2, max_size=8)


def trace_of(folder: Path, paths: list[list[bool]], last: int = 300) -> Path:
    """Write a trace whose prompts are paths in a binary tree: an id stands for its block and all before it."""
    ids: dict[tuple[bool, ...], int] = {}
    lines = []
    for path in paths:
        blocks = [ids.setdefault(tuple(path[: k + 1]), len(ids)) for k in range(len(path))]
        # Who ends with the same block ends with the same tokens of it.
        length = BLOCK * (len(path) - 1) + last
        lines.append(json.dumps({"timestamp": 0, "input_length": length, "output_length": 2, "hash_ids": blocks}))
    file = folder / "tree.jsonl"
    file.write_text("\n".join(lines))
    return file


@settings(deadline=None)
@given(paths=HASHES, scale=st.sampled_from([1.0, 0.37, 0.05, 1.5]))
def test_prompts_of_a_trace_share_exactly_the_prefix_that_their_hashes_share(
    tmp_path_factory: pytest.TempPathFactory, paths: list[list[bool]], scale: float
) -> None:
    rows = read_trace(trace_of(tmp_path_factory.mktemp("t"), paths), Scaling(scale))
    requests = Load(None, None, len(rows), 0, rows, concurrency=2, scaling=Scaling(scale), share=True).measured()
    prompts = prompts_of(requests)
    for (path, one), (other, two) in itertools.combinations(zip(paths, prompts, strict=True), 2):
        same = shared([*map(int, path)], [*map(int, other)])
        wanted = min(round(BLOCK * same * scale), len(one), len(two))
        # Different blocks can begin with the same token by chance.
        assert wanted <= shared(one, two) <= wanted + 2


def test_a_real_trace_shares_what_it_says_and_only_when_asked() -> None:
    scaling = Scaling(0.1, max_isl=600)
    rows = read_trace(EXCERPT, scaling)
    common = {"isl": None, "osl": None, "count": 200, "seed": 1, "rows": rows, "concurrency": 4, "scaling": scaling}
    plain = prompts_of(Load(**common).measured())  # type: ignore[arg-type]
    assert len({tuple(prompt[:1]) for prompt in plain}) == 200
    asked = Load(**common, share=True)  # type: ignore[arg-type]
    prompts = prompts_of(asked.measured())
    assert (asked.shared_prefix, Load(**common).shared_prefix) == (True, False)  # type: ignore[arg-type]
    assert rows[0].blocks[0] == rows[1].blocks[0] != rows[0].blocks[1] != rows[1].blocks[1]
    assert shared(prompts[0], prompts[1]) in (51, 52)
    # Another load point has the same structure of other tokens.
    other = prompts_of(asked.measured(), number=1)
    assert shared(other[0], other[1]) in (51, 52)
    assert shared(prompts[0], other[0]) <= 2
    assert prompts == prompts_of(asked.measured())


def test_warmup_shares_nothing_of_a_trace() -> None:
    rows = read_trace(EXCERPT, Scaling(0.01))
    asked = Load(None, None, 20, 1, rows, concurrency=4, scaling=Scaling(0.01), share=True)
    assert all(not request.pieces for request in asked.warmup(30))
    assert [r.isl for r in asked.warmup(3)] == [row.isl for row in rows[:3]]


@pytest.mark.parametrize("groups", [1, 3])
def test_a_system_prompt_is_shared_by_its_group_and_nothing_else_is(groups: int) -> None:
    asked = load(prefix=Prefix(50, groups))
    requests = asked.measured()
    plain = load().measured()
    assert [(r.isl - 50, r.osl) for r in requests] == [(r.isl, r.osl) for r in plain]
    prompts = prompts_of(requests)
    assert len({tuple(prompt[:50]) for prompt in prompts}) == groups
    assert len({prompt[50] for prompt in prompts}) == len(prompts)
    assert asked.warmup(1)[0].pieces[0].name.startswith("prefix/")
    chat = json.loads(bytes(bodies(requests, Target("chat", "text", "m")).measure[0]))["messages"]  # type: ignore[arg-type]
    assert [(m["role"], len(m["content"].split())) for m in chat] == [("system", 50), ("user", requests[0].isl - 50)]


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.one_of(st.none(), st.integers(0, 4)), st.integers(0, 20))
def test_conversations_hold_together(count: int, turns: int, context: int | None, seed: int) -> None:
    how = Conversation(Lengths.parse(f"1-{turns}"), (0.5, 2.0), context)
    requests = load(count=count, conversation=how, seed=seed).measured()
    assert [r.index for r in requests] == list(range(count))
    assert [(r.isl, r.osl) for r in requests if r.after is None] == [
        (one.isl, one.osl) for one, r in zip(load(count=count, seed=seed).measured(), requests, strict=True) if r.after is None
    ]
    begin = 0
    for request in requests:
        if request.after is None:
            begin = request.index
        else:
            assert request.after == request.index - 1
            assert 0.5 <= request.think_s <= 2.0
        assert request.index - begin < turns
        most = request.index - begin if context is None else min(context, request.index - begin)
        assert request.answers == tuple(range(request.index - most, request.index))
        assert request.isl == sum(piece.tokens for piece in request.pieces)


def test_a_turn_repeats_the_whole_conversation_before_it() -> None:
    requests = load(count=6, conversation=Conversation(Lengths.parse("3")), prefix=Prefix(10)).measured()
    prompts = prompts_of(requests)
    for before, after in ((0, 1), (1, 2), (3, 4), (4, 5)):
        assert prompts[after][: len(prompts[before])] == prompts[before]
        # its made-up answer of 5 tokens, and the next question
        assert len(prompts[after]) > len(prompts[before]) + 5 + 19
    assert shared(prompts[2], prompts[3]) == 10


def test_a_conversation_in_text_waits_for_the_real_answers() -> None:
    requests = load(count=3, conversation=Conversation(Lengths.parse("3"), context=1)).measured()
    said = 'a "quoted"\nanswer \u00e9'
    first, second, third = bodies(requests, Target("chat", "text", "m")).measure
    assert isinstance(first, bytes)
    assert isinstance(second, Template)
    assert isinstance(third, Template)
    opening = json.loads(first)["messages"]
    filled = json.loads(pickle.loads(pickle.dumps(second)).fill({0: said}))["messages"]
    assert filled[:1] == opening
    assert [m["role"] for m in filled] == ["user", "assistant", "user"]
    assert filled[1]["content"] == said
    last = json.loads(third.fill({1: said}))["messages"]
    assert last[0] == filled[2]
    plain = bodies(requests, Target("completions", "text", "m")).measure[1]
    assert isinstance(plain, Template)
    text = json.loads(plain.fill({0: said}))["prompt"]
    assert text == f"{opening[0]['content']} {said} {filled[2]['content']}"
    assert json.loads(plain.fill({}))["prompt"] == f"{opening[0]['content']}  {filled[2]['content']}"


def test_a_long_conversation_forgets_its_beginning_rather_than_exceed_the_longest_prompt() -> None:
    how = Conversation(Lengths.parse("8"))
    requests = load(count=8, conversation=how, scaling=Scaling(max_isl=100)).measured()
    assert max(r.isl for r in requests) <= 100
    assert requests[-1].answers[0] > 0
    assert requests[-1].answers[-1] == 6


def test_an_open_loop_of_conversations_sends_its_rate_on_average() -> None:
    requests = load(count=400, concurrency=None, rate=10.0, conversation=Conversation(Lengths.parse("4"))).measured()
    heads = [r for r in requests if r.after is None]
    assert len(heads) == 100
    assert all((r.due_s is None) == (r.after is not None) for r in requests)
    assert heads[-1].due_s == pytest.approx(40, rel=0.35)


def test_what_goes_to_another_process_is_no_prompt() -> None:
    (request,) = load(count=1, prefix=Prefix(9)).measured()
    copy = pickle.loads(pickle.dumps(request))
    assert (copy.index, copy.isl, copy.osl, copy.pieces) == (request.index, request.isl, request.osl, ())


@pytest.mark.parametrize("words", [("x",), ("2", "5-1"), ("2", "-1"), ("2", "1", "none"), ("2", "1", "-1"), ("0",)])
def test_bad_conversations_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(LoadError, match=r"turns: |think: |context: "):
        Conversation.parse(*words)


@pytest.mark.parametrize("target", [Target(a, k, "m") for a in ("completions", "generate", "chat") for k in ("tokens", "text")])
def test_bodies_are_what_asking_by_hand_would_send(target: Target) -> None:
    if (target.api, target.prompt) == ("chat", "tokens"):
        return
    requests = load(count=3).measured()
    made = bodies(requests, target, number=2, serial=5)
    source = Prompts(3)
    for i, request in enumerate(requests):
        make = source.tokens if target.prompt == "tokens" else source.text
        # two warm-up requests came before
        by_hand = ask(target.api, target.prompt, "m", make(f"2/measure/{i}", 5 + 2 + i, request.isl), request.osl)
        assert json.loads(bytes(made.measure[i])) == json.loads(by_hand)  # type: ignore[arg-type]
    assert len([*made.measure]) == len(made.measure) == 3


def test_what_the_model_puts_before_plain_text_is_part_of_the_length() -> None:
    requests = load(count=3).measured()
    for api, less in (("completions", 1), ("chat", 0)):
        for body, request in zip(bodies(requests, Target(api, "text", "m"), added=1).measure, requests, strict=True):
            assert isinstance(body, bytes)
            said = json.loads(body)
            text = said["prompt"] if api == "completions" else said["messages"][0]["content"]
            assert len(text.split()) == request.isl - less
