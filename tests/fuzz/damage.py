"""How good input is spoiled: values replaced, taken out and put in; texts cut, torn and filled with what is no text."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Place = tuple[Any, Any]
#: what stands where something else should: wrong types, the ends of ranges, no numbers, no characters
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 65536, 2**31, 2**63, 10**400, -0.5, 0.5, 1e308, float("nan"), float("inf")),
    *("", " ", "0", "-1", "x", "1e999", "nan", "é\0", "\ud800", "a\nb", "{{ x }}", "../..", "x" * 5000, "１２"),
    *([], {}, [None], [[]], [1, "x"], {"a": {}}, {"": None}, [{}], ["x"], [0], {"x": 1}),
)
ODD = st.sampled_from(_ODD).map(copy.deepcopy)
_TORN = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"9" * 5000,
    b"- " * 900,
    b"\n",
)


def _places(value: Any) -> Iterator[Place]:
    """Yield (container, key) of everything inside of a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(inside):
        yield value, key
        yield from _places(item)


@st.composite
def spoiled(draw: st.DrawFn, value: Any, most: int = 2) -> Any:
    """Return a copy with up to ``most`` places spoiled; now and then it is something else altogether."""
    found = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(found))
        at = draw(st.integers(-1, len(places) - 1)) if len(places) > 0 else -1
        if at < 0:
            # The whole of it, rarely: most input is wrong in one place.
            return draw(ODD) if draw(st.integers(0, 3)) == 0 else found
        container, key = places[at]
        match draw(st.sampled_from(("replace", "replace", "remove", "double"))):
            case "replace":
                container[key] = draw(ODD)
            case "remove":
                del container[key]
            case "double" if isinstance(container, list):
                container.insert(key, copy.deepcopy(container[key]))
            case _:
                container[f"{key}x"] = container[key]
    return found


@st.composite
def torn(draw: st.DrawFn, raw: bytes) -> bytes:
    """Return a text with one piece cut out, or put in twice, or something put in that is no text."""
    start, end = sorted((draw(st.integers(0, len(raw))), draw(st.integers(0, len(raw)))))
    match draw(st.sampled_from(("cut", "end", "twice", "put"))):
        case "cut":
            return raw[:start] + raw[end:]
        case "end":
            return raw[:start]
        case "twice":
            return raw[:end] + raw[start:]
        case _:
            return raw[:start] + draw(st.sampled_from(_TORN)) + raw[start:]


def as_json(value: Any) -> bytes:
    """Return JSON as Python writes it: NaN and halves of surrogate pairs stand in it, as they do in files of others."""
    return json.dumps(value).encode()


@st.composite
def spoiled_json(draw: st.DrawFn, value: Any) -> bytes:
    """Return a JSON text with something wrong in its values, or in its letters."""
    return draw(spoiled(value).map(as_json)) if draw(st.integers(0, 3)) else draw(torn(as_json(value)))
