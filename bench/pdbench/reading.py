"""JSON and YAML that others wrote: whatever is wrong with them is a ValueError with one short line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: what fits into the columns of our tables; larger whole numbers are of no quantity that we know
_LARGEST = 2**63 - 1
#: values of a file that a person writes; aliases of YAML can stand for any number of them
_MOST_VALUES = 1_000_000
#: a word that nobody reads to its end; lists of hosts have commas
_LONG_WORD = re.compile(r"[^\s,]{1000,}")


def json_of(text: str | bytes) -> Any:
    """Return what a JSON text says; raise ValueError for what is none, nested too deep, or beyond 64 bits."""
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _whole(digits: str) -> int:
    number = int(digits) if len(digits) < 21 else _LARGEST + 1
    if abs(number) > _LARGEST:
        raise ValueError(f"{digits[:20]}... is too large a number")
    return number


def json_in(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} where there is none: what it is needed for is then left out and said so."""
    try:
        value = json_of(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def yaml_of(text: str) -> Any:
    """Return what a YAML text says, without tags; raise ValueError, with the line where there is one."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, TypeError) as why:
        # A date such as 2026-13-01 and a number such as 0x_ are PyYAML's own surprises.
        raise ValueError(" ".join(str(why).split())) from None
    for number, item in enumerate(_inside(value)):
        if number > _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES} values")
        if isinstance(item, int) and abs(item) > _LARGEST:
            raise ValueError("a number in it is too large")
    return value


def _inside(value: Any) -> Iterator[Any]:
    left = [value]
    while left:
        item = left.pop()
        yield item
        if isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, (list, tuple, set)):
            left += item


def brief(message: str) -> str:
    """Return a message with words without end cut, so that it stays one that can be read."""
    shown = _LONG_WORD.sub(lambda found: f"{found[0][:80]}... ({len(found[0])} characters)", message)
    # Half a surrogate pair can stand in JSON and in Python, but in no terminal.
    return shown.encode("utf-8", "replace").decode()
