"""What is sent, read from files: prompts of a dataset, the model's tokenizer, load files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from pdbench.load.dataset import Entry, read_dataset
from pdbench.load.errors import LoadError
from pdbench.load.prompts import WORDS
from pdbench.load.tokenizer import Tokenizer
from pdbench.run.load_options import Parser, add_arguments, with_load_file
from pdbench.run.load_points import Loads, build
from pdbench.run.table import load_name
from pdbench.sweep import asked

TRACE = Path(__file__).resolve().parents[1] / "data" / "mooncake_excerpt.jsonl"
SHAREGPT = [
    {"id": "a", "conversations": [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three four five"}]},
    {"conversations": [{"from": "gpt", "value": "out of turn"}, {"from": "human", "value": "x"}]},
    {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a b c"}, {"from": "gpt", "value": "d"}]},
    {"conversations": []},
]


def words(text: str) -> int:
    return len(text.split())


def written(folder: Path, text: str) -> Path:
    path = folder / "d.jsonl"
    path.write_text(text)
    return path


def lines(*rows: object) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def test_json_lines_hold_text_ids_or_messages(tmp_path: Path) -> None:
    read = read_dataset(written(tmp_path, lines({"prompt": "a b", "output_tokens": 7}, {"prompt": "c"})), None, words, False)
    assert read == [Entry("a b", 2, 7), Entry("c", 1, 0)]
    read = read_dataset(written(tmp_path, lines({"prompt": [1, 2, 3], "max_tokens": 4})), None, words, False)
    assert read == [Entry([1, 2, 3], 3, 4)]
    said = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    (entry,) = read_dataset(written(tmp_path, "\n" + lines({"messages": said})), None, words, False)
    assert (entry.content, entry.isl) == (said, 3)


@pytest.mark.parametrize("text", [json.dumps(SHAREGPT, indent=1), lines(*SHAREGPT)])
def test_sharegpt_gives_the_first_question_and_the_length_of_its_answer(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    assert read_dataset(path, None, words, True) == [Entry("one two", 2, 3), Entry("a b c", 3, 1)]
    assert [entry.osl for entry in read_dataset(path, 1, words, False)] == [0]
    assert read_dataset(path, None, words, True, longest=2) == [Entry("one two", 2, 3)]
    with pytest.raises(LoadError, match="holds 2 requests, fewer than --num-requests 3"):
        read_dataset(path, 3, words, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no request"),
        (lines({"prompt": "a"}) + "\n{", "line 2: no JSON"),
        (lines({"prompt": "a"}, 5), "line 2: no request"),
        (lines({"text": "a"}), "line 1: no request"),
        (lines({"prompt": "a", "messages": []}), "line 1: no request"),
        (lines({"prompt": "a"}, {"prompt": ""}), "line 2: prompt must be text or a list"),
        (lines({"prompt": [1, -1]}), "line 1: prompt must be"),
        (lines({"prompt": "a", "output_tokens": 0}), "line 1: say output_tokens once"),
        (lines({"prompt": "a", "output_tokens": 3, "max_tokens": 3}), "line 1: say output_tokens once"),
        (lines({"prompt": "a"}, {"prompt": [1]}), "line 2: one file is text, token ids or messages throughout.*line 1"),
        (lines({"messages": [{"role": "user"}]}), "line 1: messages must be a list such as"),
        (lines({"conversations": [{"from": "human"}]}), "line 1: a turn has no 'value'"),
        (lines({"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": "x"}]}), "line 1: .* must be text"),
        ("[\n{}\n", "line 3: the list breaks off"),
        ('[{"prompt": 5}]', "entry 1: prompt must be"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(LoadError, match=expected):
        read_dataset(written(tmp_path, text), None, words, True)


def test_a_missing_or_binary_dataset_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot read the dataset"):
        read_dataset(tmp_path / "none", None, words, True)
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoadError, match="no text file"):
        read_dataset(tmp_path / "b", None, words, True)


class Fast:
    """Stands for `tokenizers.Tokenizer`: a word is a token, one of more than ``most`` letters is two; 1 begins a text."""

    most = 4

    @classmethod
    def from_file(cls, path: str) -> Fast:
        if "broken" in Path(path).read_text():
            raise Exception("expected value at line 1")
        return cls()

    def no_truncation(self) -> None: ...

    def no_padding(self) -> None: ...

    def encode(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        ids = [5 for word in text.split() for _ in range(1 + (len(word) > self.most))]
        return SimpleNamespace(ids=[1, *ids] if add_special_tokens else ids)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a model's folder whose tokenizer the stand-in reads."""
    module = ModuleType("tokenizers")
    module.Tokenizer = Fast  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tokenizers", module)
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def test_a_tokenizer_counts_and_says_which_words_are_one_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (folder, folder / "tokenizer.json"):
        tokenizer = Tokenizer.load(path)
        assert (tokenizer.count("time flies"), tokenizer.added) == (3, 1)
        assert tokenizer.words() == WORDS
    monkeypatch.setattr(Fast, "most", 3)
    with pytest.raises(LoadError, match=f"only 0 of {len(WORDS)} words are one token.*use --prompt tokens"):
        Tokenizer.load(folder).words()


def test_a_tokenizer_that_cannot_be_had_is_one_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadError, match="give the model's folder"):
        Tokenizer.load(folder / "absent")
    (folder / "tokenizer.json").write_text("broken")
    with pytest.raises(LoadError, match="is not what the package tokenizers reads: expected value"):
        Tokenizer.load(folder)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(LoadError, match=r"\.venv/bin/python -m pip install -e 'bench\[tokenizer\]'"):
        Tokenizer.load(folder)


def loads(*argv: str, api: str = "completions", plan: bool = False) -> Loads:
    parser = Parser()
    add_arguments(parser)
    return build(with_load_file(parser, argv), api, plan)


def file(folder: Path, text: str) -> str:
    (folder / "load.yml").write_text(text)
    return str(folder / "load.yml")


def test_stages_are_load_points_with_the_same_requests(tmp_path: Path) -> None:
    said = """
    isl: 16-64
    osl: 8
    num_requests: 40
    stages:
      - concurrency: 4
      - {request_rate: 8, duration: 5, arrival: constant}
      - {request_rate: 2, to: 6, duration: 10, arrival: constant}
      - batch: 16
      - {concurrency: 2, num_requests: 5}
    """
    sent = loads("--load", file(tmp_path, said))
    points = [(p.concurrency, p.rate, p.rate_to, p.count) for p in sent.loads]
    assert points == [(4, None, None, 40), (None, 8, None, 40), (None, 2, 6, 40), (16, None, None, 16), (2, None, None, 5)]
    lengths = [[(r.isl, r.osl) for r in p.measured()] for p in sent.loads]
    assert all(found == lengths[0][: len(found)] for found in lengths)
    assert [d["num_requests"] for d in sent.described] == [40, 40, 40, 16, 5]
    # Whatever is written of a load tells it from others: in the tidy table's "asked", or in columns of their own.
    columns = {"concurrency", "request_rate", "seed", "duration_s"}
    assert set(sent.described[0]) - columns == set(asked.POINT)
    assert [d["batch"] for d in sent.described] == [False, False, False, True, False]
    assert [load_name(d) for d in sent.described] == ["c=4", "8 req/s", "2-6 req/s", "c=16", "c=2"]
    assert sent.loads[2].measured()[-1].due_s < 10  # type: ignore[operator]


def test_a_batch_is_one_point_with_a_slot_for_every_request() -> None:
    (load,) = loads("--batch", "9000", "--isl", "4000", "--osl", "100").loads
    assert (load.concurrency, load.count, len(load.measured())) == (9000, 9000, 9000)


def test_the_command_line_comes_first(tmp_path: Path) -> None:
    path = file(tmp_path, "isl: 16\nosl: 8\nseed: 3\nprefix_len: 5\nstages: [{concurrency: 2, num_requests: 4}]\nnum_requests: 7")
    assert [p.concurrency for p in loads("--load", path).loads] == [2]
    (point,) = loads("--load", path, "--request-rate", "5", "--isl", "32", "--duration", "2", "--arrival", "constant").loads
    assert (point.rate, point.count, str(point.isl), str(point.osl), point.seed) == (5, 10, "32", "8", 3)
    assert loads("--load", path, "--seed", "4").loads[0].seed == 4
    path = file(tmp_path, "isl: 16\nconcurrency: 3")
    (point,) = loads("--load", path, "--trace", str(TRACE), "--time-scale", "0.5").loads
    assert (point.replay, point.concurrency, point.isl) == (0.5, None, None)


def test_a_load_file_says_conversations_prefixes_and_lists(tmp_path: Path) -> None:
    said = """
    isl: lognormal:64:0.4
    osl: 8@0.5,16@0.5
    concurrency: [2, 4]
    num_requests: 20
    prefix_len: 10
    prefix_groups: 3
    conversation: {turns: 2-4, think: 0.5-1, context: 2}
    """
    sent = loads("--load", file(tmp_path, said))
    assert [p.concurrency for p in sent.loads] == [2, 4]
    how = sent.loads[0].conversation
    assert how is not None
    assert (str(how.turns), how.think_s, how.context) == ("2-4", (0.5, 1.0), 2)
    assert sent.loads[0].prefix is not None
    assert sent.loads[0].prefix.groups == 3
    assert sent.described[0]["conversation"] == {"turns": "2-4", "think": "0.5-1", "context": 2}
    assert sent.described[0]["shared_prefix"] is True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("isl: [", "is no YAML"),
        ("- isl", "write keys and values"),
        ("isl: 16\nrate: 5", "'rate' is no key of a load file; keys: .*request_rate"),
        ("url: http://127.0.0.1", "'url' is no key"),
        ("num_requests: many", "load.yml: argument --num-requests: invalid int value"),
        ("isl: {a: 1}", "load.yml: isl: .* is neither text nor number"),
        ("isl: true", "load.yml: isl: True is neither"),
        ("isl: 0\nosl: 1\nconcurrency: 1\nnum_requests: 1", "--isl: '0' is no length"),
        ("isl: 1\nosl: 1\nstages: 5", "stage 1: say one of"),
        ("isl: 1\nosl: 1\nstages: []", "stage 1: say one of"),
        ("isl: 1\nosl: 1\nstages: [{concurrency: 1, request_rate: 2}]", "stage 1: say one of"),
        ("isl: 1\nosl: 1\nstages: [{concurrency: 1, duration: 2}]", "stage 1: 'duration' does not go with concurrency"),
        ("isl: 1\nosl: 1\nstages: [{concurrency: 1, num_requests: 2}, {concurrency: x}]", "stage 2: --concurrency 'x': write"),
        ("isl: 1\nosl: 1\nstages: [{request_rate: 1, to: 2, num_requests: 9}]", "stage 1: a ramp .to. needs its duration"),
        ("isl: 1\nosl: 1\nstages: [{request_rate: 1, arrival: even, num_requests: 9}]", "stage 1: 'even' is no arrival"),
        ("isl: 1\nosl: 1\nstages: [{concurrency: 1}]", "--num-requests N is missing"),
        ("isl: 1\nosl: 1\nconcurrency: 1\nstages: [{concurrency: 1}]", "--concurrency and stages are ways"),
        ("isl: 1\nosl: 1\nconcurrency: 1\nnum_requests: 1\nconversation: 5", "conversation: write turns, think and context"),
        ("isl: 1\nosl: 1\nconcurrency: 1\nnum_requests: 1\nconversation: {turns: 0}", "conversation: turns: '0' is no length"),
        ("isl: 1\nosl: 1\nconcurrency: 1\nnum_requests: 1\nprefix_groups: 2", "prefix_groups goes with prefix_len"),
        ("isl: 1\nosl: 1\nconcurrency: 1\nnum_requests: 1\nprefix_len: 4\nprefix_groups: 0", "prefix_groups: 0; write"),
        (f"trace: {TRACE}\nconcurrency: 1\nconversation: {{turns: 2}}", "conversation goes with prompts that are made up"),
    ],
)
def test_a_bad_load_file_is_one_message(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(LoadError, match=expected):
        loads("--load", file(tmp_path, text))


def test_a_missing_load_file_is_one_message() -> None:
    with pytest.raises(LoadError, match="cannot read --load /nonexistent"):
        loads("--load", "/nonexistent")


def dataset(folder: Path, *rows: object) -> Sequence[str]:
    return ("--dataset", str(written(folder, lines(*rows))), "--concurrency", "2")


def test_text_of_a_dataset_is_sent_as_text_or_as_exact_ids(folder: Path) -> None:
    argv = dataset(folder, {"prompt": "time flies", "output_tokens": 3}, {"prompt": "so be it"})
    sent = loads(*argv, "--osl", "4")
    assert (sent.kind, [(r.isl, r.osl, r.content) for r in sent.loads[0].measured()]) == (
        "text",
        [(2, 4, "time flies"), (3, 4, "so be it")],
    )
    sent = loads(*argv, "--osl", "4", "--tokenizer", str(folder))
    assert (sent.kind, [(r.isl, r.content) for r in sent.loads[0].measured()]) == (
        "tokens",
        [(4, [1, 5, 5, 5]), (4, [1, 5, 5, 5])],
    )
    assert loads(*argv, "--osl", "4", "--tokenizer", str(folder), api="chat").kind == "text"
    assert sent.prompts.added == 1
    assert len(sent.loads[0].warmup(5)) == 5


def test_a_dataset_keeps_its_own_output_lengths(tmp_path: Path) -> None:
    argv = dataset(tmp_path, {"prompt": [1, 2], "output_tokens": 3}, {"prompt": [3], "output_tokens": 90})
    sent = loads(*argv, "--max-osl", "50")
    assert (sent.kind, [(r.isl, r.osl) for r in sent.loads[0].measured()]) == ("tokens", [(2, 3), (1, 50)])
    assert sent.loads[0].shared_prefix


@pytest.mark.parametrize(
    ("row", "options", "api", "expected"),
    [
        ({"prompt": "a"}, (), "completions", "--osl is missing: .*'?a"),
        ({"prompt": "a"}, ("--osl", "3", "--isl", "5"), "completions", "--isl does not go with --dataset"),
        ({"prompt": "a"}, ("--osl", "3", "--prompt", "tokens"), "completions", "needs the model's --tokenizer"),
        ({"prompt": [1]}, ("--osl", "3"), "chat", "holds token ids"),
        ({"messages": [{"role": "user", "content": "x"}]}, ("--osl", "3"), "generate", "they go with --api chat"),
        ({"prompt": "a"}, ("--osl", "3", "--concurrency", "1,2"), "completions", "the same at every load point"),
        ({"prompt": "a"}, ("--osl", "3", "--prefix-len", "2"), "completions", "--prefix-len goes with prompts that are made up"),
        ({"prompt": "a"}, ("--osl", "3", "--trace", str(TRACE)), "completions", "--trace and --dataset are two loads"),
    ],
)
def test_what_does_not_go_with_a_dataset(
    tmp_path: Path, row: dict[str, object], options: Sequence[str], api: str, expected: str
) -> None:
    with pytest.raises(LoadError, match=expected):
        loads(*dataset(tmp_path, row), *options, api=api)


def test_caches_that_are_emptied_allow_a_dataset_at_several_points(tmp_path: Path) -> None:
    sent = loads(*dataset(tmp_path, {"prompt": "a"}), "--osl", "3", "--concurrency", "1,2", plan=True)
    assert len(sent.loads) == 2


def test_a_trace_with_a_duration_ends_in_time() -> None:
    (point,) = loads("--trace", str(TRACE), "--time-scale", "0.5", "--duration", "6").loads
    due = [r.due_s or 0.0 for r in point.measured()]
    assert max(due) < 6
    assert 1 < len(due) < 200
