"""What verbs have in common in how they end."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps


def ends_by_code(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Let a verb return argparse's exit code (0 for --help, 2 for bad usage) where argparse would end the program."""

    @wraps(main)
    def run(argv: list[str]) -> int:
        try:
            return main(argv)
        except SystemExit as stop:
            return int(stop.code or 0)

    return run
