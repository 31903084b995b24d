"""The options that say what is sent, and the file that holds them (`--load`)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pdbench.load import lengths
from pdbench.load.arrivals import ARRIVALS
from pdbench.load.errors import LoadError
from pdbench.reading import yaml_of
from pdbench.run.asks import PROMPT_KINDS

#: ways to say how much load
PACES = ("concurrency", "request_rate", "batch")
#: keys of a load file that are no options
_FILE_ONLY = ("stages", "conversation", "prefix_groups")
#: what replaces each other: one of them on the command line puts away those in the file
_EITHER = ((*PACES, "stages", "time_scale"), ("num_requests", "duration"), ("trace", "dataset", "isl"))

HELP = f"""lengths (--isl, --osl): {lengths.GRAMMAR}.
A load file holds the options of these groups by their names (num_requests: 200), and beside them
  stages: a list of load points, each with concurrency, request_rate or batch, num_requests or duration, arrival;
    a rate with `to` and duration is a ramp: {{request_rate: 1, to: 8, duration: 60}}
  conversation: {{turns: 2-6, think: 1-5, context: full}} (context: or how many earlier turns a prompt repeats)
  prefix_groups: how many system prompts there are (default: 1)
What is given on the command line comes first. docs/load.md has examples."""


class Parser(argparse.ArgumentParser):
    """A parser that raises LoadError where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong."""
        raise LoadError(message)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is sent."""
    load = parser.add_argument_group("load")
    load.add_argument("--load", type=Path, metavar="FILE", help="YAML file that describes the load, see below")
    load.add_argument("--concurrency", metavar="N[,N]", help="closed loop: requests in flight")
    load.add_argument("--request-rate", metavar="R[,R]", help="open loop: requests/s, sent on time whatever the server does")
    load.add_argument("--batch", metavar="N[,N]", help="N requests at once, and no more (as SGLang's bench_one_batch_server)")
    load.add_argument("--arrival", metavar="KIND", help=f"of an open loop: {ARRIVALS} (default: poisson)")
    load.add_argument("--num-requests", type=int, metavar="N", help="measured requests at each load point")
    load.add_argument("--duration", type=float, metavar="S", help="open loop: instead, the requests that are due in S seconds")
    load.add_argument("--isl", metavar="LENGTH", help="prompt length in tokens: 512, 256-512, and more, see below")
    load.add_argument("--osl", metavar="LENGTH", help="output length in tokens, forced; written like --isl")
    load.add_argument("--max-isl", type=int, metavar="N", help="cut longer prompts (of a --dataset: leave them out)")
    load.add_argument("--max-osl", type=int, metavar="N", help="cut longer outputs")
    load.add_argument("--prefix-len", type=int, metavar="N", help="put a system prompt of N tokens before all prompts")
    load.add_argument("--warmup", type=int, metavar="N", help="requests before each point (default: as many as are in flight)")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed sends the same requests (default: 0)")
    trace = parser.add_argument_group("trace")
    trace.add_argument("--trace", type=Path, metavar="FILE", help="lengths from a Mooncake trace instead of --isl and --osl")
    trace.add_argument(
        "--time-scale", type=float, metavar="S", help="send at the trace's times multiplied by S (0.5: twice as fast)"
    )
    trace.add_argument("--length-scale", type=float, metavar="F", help="multiply the trace's lengths (default: 1)")
    trace.add_argument("--share-prefixes", action="store_true", help="prompts share the prefixes that hash_ids name")
    prompt = parser.add_argument_group("prompts")
    prompt.add_argument("--dataset", type=Path, metavar="FILE", help="prompts from a file: JSON lines, or ShareGPT")
    prompt.add_argument(
        "--prompt", choices=PROMPT_KINDS, default="auto", help="token ids are exact; auto: token ids, text where they are refused"
    )
    prompt.add_argument("--token-ids", default="300-3800", metavar="LOW-HIGH", help="ids to draw from (default: %(default)s)")
    prompt.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="tokenizer.json, or the model's folder: makes lengths of text exact"
    )


def with_load_file(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line, with what its load file says under it; raise LoadError when that cannot be read."""
    typed = parser.parse_args(argv)
    if typed.load is None:
        return typed
    said = _read(typed.load)
    for group in _EITHER:
        if any(getattr(typed, name, None) is not None for name in group):
            said = {name: value for name, value in said.items() if name not in group}
    own = Parser(prog=str(typed.load), add_help=False, allow_abbrev=False)
    add_arguments(own)
    names = {action.dest for action in own._actions} - {"load"}
    words: list[str] = []
    for name, value in said.items():
        if name in _FILE_ONLY:
            continue
        if name not in names:
            raise LoadError(f"{typed.load}: {name!r} is no key of a load file; keys: {', '.join(sorted({*names, *_FILE_ONLY}))}")
        if name == "share_prefixes" and isinstance(value, bool):
            words += ["--share-prefixes"] if value else []
            continue
        words.append(f"--{name.replace('_', '-')}={_word(value, f'{typed.load}: {name}')}")
    under = argparse.Namespace()
    try:
        own.parse_args(words, namespace=under)
    except LoadError as why:
        raise LoadError(f"{typed.load}: {why}") from None
    for name in _FILE_ONLY:
        setattr(under, name, said.get(name))
    del under.load
    return parser.parse_args(argv, namespace=under)


def _read(path: Path) -> dict[str, Any]:
    try:
        said = yaml_of(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as why:
        raise LoadError(f"cannot read --load {path}: {getattr(why, 'strerror', None) or 'it is no text'}") from None
    except ValueError as why:
        raise LoadError(f"--load {path} is no YAML: {why}") from None
    if not isinstance(said, dict) or not said:
        raise LoadError(f"--load {path}: write keys and values, such as isl: 512")
    return {str(key): value for key, value in said.items() if value is not None}


def _word(value: object, where: str) -> str:
    """Return a value as it is written on the command line."""
    several = value if isinstance(value, list) else [value]
    if not several or any(isinstance(item, bool) or not isinstance(item, (int, float, str)) for item in several):
        raise LoadError(f"{where}: {value!r} is neither text nor number (nor a list of them)")
    return ",".join(str(item) for item in several)


def numbers(name: str, value: object) -> list[float]:
    """Return one number or several, written as on the command line; whole ones but for rates and seconds."""
    whole = name in ("concurrency", "batch", "num_requests")
    try:
        found = [int(word) if whole else float(word) for word in str(value).split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < n < math.inf for n in found):
        kind = "whole numbers from 1 up, such as 32,64,128" if whole else "numbers above 0, such as 2,4,8"
        raise LoadError(f"{option(name)} {str(value)!r}: write {kind}")
    return found


def number(name: str, value: object) -> float:
    """Return one number, as `numbers` reads it."""
    found = numbers(name, value)
    if len(found) > 1:
        raise LoadError(f"{option(name)} {str(value)!r}: write one number")
    return found[0]


def option(name: str) -> str:
    """Return the option whose value argparse calls ``name``; what stands in load files alone is no option."""
    return name if name in (*_FILE_ONLY, "to") else f"--{name.replace('_', '-')}"


def at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Raise LoadError for a value below ``least``."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise LoadError(f"{option(name)} must be at least {least}, not {value:g}")


def above_zero(args: argparse.Namespace, *names: str) -> None:
    """Raise LoadError for a value that is not above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise LoadError(f"{option(name)} must be above 0, not {value:g}")
