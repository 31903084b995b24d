"""Runs a Python module with secrets as the values of its last flags, so that they stand in no command line.

    python with_api_key.py --FLAG KEYFILE [--FLAG KEYFILE ...] MODULE [ARGS...]

is `python -m MODULE ARGS... --FLAG=<what KEYFILE holds> ...`, but flags and keys are added inside this process: they
are neither in /proc/<pid>/cmdline nor in /proc/<pid>/environ, and what this process logs through `logging` shows *** in
a key's place (SGLang logs all its arguments at the start).

A KEYFILE must be a regular file of the user who runs this, closed to everyone else (0600 or 0400), and hold one word.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import runpy
import stat
import sys

USAGE = "usage: python with_api_key.py --FLAG KEYFILE [--FLAG KEYFILE ...] MODULE [ARGS...]"


class KeyFileError(Exception):
    """The key file cannot be used; the message says why, and never what it holds."""


def read_key(path: str) -> str:
    """The word in the key file. The checks are made on the open file, so it cannot be exchanged in between."""

    def without_waiting(name: str, flags: int) -> int:
        # opening a pipe waits for a writer
        return os.open(name, flags | os.O_NONBLOCK)

    try:
        with open(path, encoding="utf-8", opener=without_waiting) as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise KeyFileError(f"{path} is not a regular file")
            if state.st_uid != os.geteuid():
                raise KeyFileError(f"{path} belongs to user {state.st_uid}, not to user {os.geteuid()} who runs this")
            if state.st_mode & 0o077:
                raise KeyFileError(f"{path} has mode {stat.S_IMODE(state.st_mode):04o}: others must not read it, use 0600")
            words = file.read().split()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"cannot read {path}: {error}") from error
    if len(words) != 1:
        raise KeyFileError(f"{path} holds {len(words)} words: it must hold the key and nothing else")
    return words[0]


def hide_in_logs(secrets: list[str]) -> None:
    """Let every record that this process logs from now on show *** where one of the `secrets` stands."""

    class Record(logging.LogRecord):
        def getMessage(self) -> str:
            message = super().getMessage()
            # one that is part of another goes last
            for secret in sorted(secrets, key=len, reverse=True):
                message = message.replace(secret, "***")
            return message

    logging.setLogRecordFactory(Record)


def found(module: str) -> bool:
    """Whether there is such a module to run."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def main(argv: list[str]) -> int:
    """Command line; see the top of the file. Returns only when there was nothing to run, or when MODULE returned."""
    files, rest = [], argv[1:]
    while len(rest) > 2 and rest[0].startswith("--"):
        files.append((rest[0], rest[1]))
        rest = rest[2:]
    if not files or rest[0].startswith("--"):
        print(USAGE, file=sys.stderr)
        return 2
    module, *arguments = rest
    # `python -m` has the working folder where `python FILE` has the folder of FILE
    sys.path[0] = os.getcwd()
    try:
        keys = [(flag, read_key(path)) for flag, path in files]
    except KeyFileError as error:
        print(f"with_api_key: {error}", file=sys.stderr)
        return 2
    if not found(module):
        print(f"with_api_key: {sys.executable} has no module {module}", file=sys.stderr)
        return 2
    hide_in_logs([key for _, key in keys])
    # One word each: argparse takes a key that begins with "-" for a flag.
    sys.argv = [module, *arguments, *(f"{flag}={key}" for flag, key in keys)]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


# processes which MODULE spawns import the main module again, and must not start it again
if __name__ == "__main__":
    sys.exit(main(sys.argv))
