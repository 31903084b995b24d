"""What must hold whatever is handed in: no traceback, an end, the exit code that --help names, one message that says where."""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TypeVar

from pdbench.cli import main

_T = TypeVar("_T")
#: CPU seconds after which a call is called a hang; good ones take a hundredth of it
_LONGEST_S = 20.0


class BrokenLawError(AssertionError):
    """What was done with the input must not be done with any."""


@contextlib.contextmanager
def ends() -> Iterator[None]:
    """Break off what has used far more CPU time than it can need."""

    def late(number: int, frame: FrameType | None) -> None:
        raise BrokenLawError(f"no end after {_LONGEST_S:g} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, _LONGEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def read(call: Callable[[], _T], refusals: type[Exception] | tuple[type[Exception], ...], *named: str) -> _T | None:
    """Return what ``call`` makes of the input, None when it refuses it in words that name one of ``named``."""
    try:
        with ends():
            return call()
    except refusals as why:
        said = str(why)
        check_words(said, named)
        return None


def check_words(said: str, named: Sequence[str]) -> None:
    """Refuse messages that say nothing, are no text, or do not name what they are about."""
    if not said.strip() or "Traceback" in said:
        raise BrokenLawError(f"no message for a user: {said!r}")
    if len(said) > 4000:
        raise BrokenLawError(f"a message of {len(said)} characters: {said[:200]!r}...")
    said.encode("utf-8")
    if named and not any(name in said for name in named):
        raise BrokenLawError(f"the message names none of {', '.join(named)}: {said!r}")


def command(argv: Sequence[str | Path], codes: Sequence[int], *named: str) -> tuple[int, str, str]:
    """Run a `pdbench` verb in this process; return its exit code and what it wrote to stdout and to stderr."""
    out, err = io.StringIO(), io.StringIO()
    with ends(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in argv])
        except SystemExit as stop:  # argparse, which has said what is wrong
            raise BrokenLawError(f"the options are not as the verb wants them: {err.getvalue()}") from stop
    said = err.getvalue()
    if code not in codes:
        raise BrokenLawError(f"exit code {code}, not one of {codes}: {said}")
    if code in (1, 2):
        check_words(said, named)
        if not said.startswith(f"pdbench {argv[0]}: "):
            raise BrokenLawError(f"a message that does not say who speaks: {said!r}")
    (out.getvalue() + said).encode("utf-8")
    return code, out.getvalue(), said
