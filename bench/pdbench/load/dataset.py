"""Prompts from files: JSON lines (``prompt`` or ``messages``), or ShareGPT's conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pdbench.load.errors import LoadError
from pdbench.reading import json_of

FORMATS = (
    '{"prompt": "text or token ids", "output_tokens": 128}, {"messages": [{"role": "user", "content": "..."}]}, '
    'or ShareGPT: {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}'
)
_LENGTH_KEYS = ("output_tokens", "max_tokens")

#: what a request says: text, token ids, or messages of a chat
Content = str | list[int] | list[dict[str, object]]


@dataclass(frozen=True)
class Entry:
    """One request of a file; ``isl`` in tokens where there is a way to count them, else words; ``osl`` 0: not said."""

    content: Content
    isl: int
    osl: int


def read_dataset(
    path: Path, count: int | None, measure: Callable[[str], int], counted: bool, longest: int | None = None
) -> list[Entry]:
    """Return the first ``count`` requests of a file (all, when None), in its order.

    ``measure`` gives a text's length; ``counted``: it is in tokens, so that ShareGPT's answers say how long an output is.
    Of a ShareGPT conversation the first question and its answer are taken, as SGLang's and vLLM's benchmarks do;
    conversations without the two are left out, and so are prompts longer than ``longest``, which cannot be cut. Raise
    LoadError for anything that is not of one of `FORMATS`, with its line.
    """
    found: list[Entry] = []
    kinds: dict[type, str] = {}
    for where, row in _rows(path):
        if count is not None and len(found) == count:
            break
        entry = _entry(row, where, measure, counted)
        if entry is None or (longest is not None and entry.isl > longest):
            continue
        kinds.setdefault(_kind(entry.content), where)
        if len(kinds) > 1:
            raise LoadError(
                f"{where}: one file is text, token ids or messages throughout; {next(iter(kinds.values()))} is another"
            )
        found.append(entry)
    if not found:
        raise LoadError(f"{path} holds no request; write {FORMATS}")
    if count is not None and len(found) < count:
        raise LoadError(f"{path} holds {len(found)} requests, fewer than --num-requests {count}")
    return found


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield every object of the file with the place where it stands: JSON lines, or one list."""
    try:
        with path.open(encoding="utf-8") as file:
            head = file.read(64).lstrip()
            file.seek(0)
            if head.startswith("["):
                rows = json_of(file.read())
                yield from ((f"{path}, entry {number}", row) for number, row in enumerate(rows, 1))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path}, line {number}", json_of(line)
                    except ValueError:
                        raise LoadError(f"{path}, line {number}: no JSON; write {FORMATS}") from None
    except OSError as why:
        raise LoadError(f"cannot read the dataset {path}: {why.strerror or why}") from None
    except UnicodeDecodeError:
        raise LoadError(f"{path} is no text file; write {FORMATS}") from None
    except json.JSONDecodeError as why:
        raise LoadError(f"{path}, line {why.lineno}: the list breaks off or is no JSON ({why.msg})") from None
    except LoadError:
        raise
    except ValueError as why:
        raise LoadError(f"{path}: the list is no JSON: {why}") from None


def _entry(row: object, where: str, measure: Callable[[str], int], counted: bool) -> Entry | None:
    if not isinstance(row, dict) or sum(key in row for key in ("prompt", "messages", "conversations")) != 1:
        raise LoadError(f"{where}: no request; write {FORMATS}")
    if "conversations" in row:
        return _sharegpt(row, where, measure, counted)
    said = [key for key in _LENGTH_KEYS if row.get(key) is not None]
    osl = row[said[0]] if said else 0
    if len(said) > 1 or (said and not _whole(osl)):
        raise LoadError(f"{where}: say output_tokens once, as a whole number from 1 up")
    content = row.get("prompt", row.get("messages"))
    if "messages" in row:
        return Entry(_messages(content, where), sum(measure(text) for text in _texts(content)), osl)
    if isinstance(content, str) and content:
        return Entry(content, measure(content), osl)
    if isinstance(content, list) and content and all(_whole(token, 0) for token in content):
        return Entry(content, len(content), osl)
    raise LoadError(f"{where}: prompt must be text or a list of token ids, and not empty")


def _sharegpt(row: Mapping[str, object], where: str, measure: Callable[[str], int], counted: bool) -> Entry | None:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise LoadError(f"{where}: conversations must be a list of turns; write {FORMATS}")
    try:
        said = [(turn["from"], turn["value"]) for turn in turns]
    except KeyError as key:
        raise LoadError(f"{where}: a turn has no {key}; write {FORMATS}") from None
    spoken = [(who, text) for who, text in said if who != "system"]
    if len(spoken) < 2 or spoken[0][0] not in ("human", "user"):
        return None
    question, answer = spoken[0][1], spoken[1][1]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise LoadError(f"{where}: what a turn says must be text")
    if not question or not answer:
        return None
    return Entry(question, measure(question), max(1, measure(answer)) if counted else 0)


def _messages(value: object, where: str) -> list[dict[str, object]]:
    good = isinstance(value, list) and value and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
    if not good or not all("content" in m for m in cast(list[dict[str, object]], value)):
        raise LoadError(f'{where}: messages must be a list such as [{{"role": "user", "content": "..."}}]')
    return cast(list[dict[str, object]], value)


def _texts(messages: object) -> Iterator[str]:
    for message in cast(list[dict[str, object]], messages):
        if isinstance(message["content"], str):
            yield message["content"]


def _whole(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _kind(content: Content) -> type:
    return str if isinstance(content, str) else type(content[0])
