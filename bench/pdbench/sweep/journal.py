"""What has happened in a sweep, kept so that a controller which dies loses at most the running cell."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pdbench.reading import json_of
from pdlib.errors import UserError

Json = dict[str, Any]
JOURNAL, SWEEP, LOCK = "journal.jsonl", "sweep.json", ".lock"

#: What a cell's attempt may end as; one that was only ``started`` was interrupted.
FINISHED, INVALID, FAILED = "finished", "invalid", "failed"
ENDS = (FINISHED, INVALID, FAILED)


class Journal:
    """The events of one sweep's folder, in memory and, before anything else happens, on disk."""

    def __init__(self, folder: Path):
        self.path = folder / JOURNAL
        self.events = self._read()

    def _read(self) -> list[Json]:
        """Return the events; a last line that was cut off is taken away, so that the next one stands on its own."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        found = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found.append(_event(json_of(line)))
            except ValueError as why:
                raise UserError(f"{self.path}, line {number}: no event of a sweep ({why}); take the line out") from None
        return found

    def write(self, event: str, **fields: Any) -> None:
        """Append an event; it is on disk when this returns."""
        entry = {"event": event, "time": round(time.time(), 3), **fields}
        with open(self.path, "ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.events.append(entry)

    def measured(self) -> set[tuple[str, int]]:
        """Return the (cell, repeat) that have a valid run."""
        return {(one["cell"], one["repeat"]) for one in self.events if one["event"] == FINISHED}

    def attempts(self, cell: str, repeat: int) -> int:
        """Return how many attempts were started."""
        own = [one["attempt"] for one in self.events if (one.get("cell"), one.get("repeat")) == (cell, repeat)]
        return max(own, default=0)

    def last(self) -> dict[tuple[str, int], Json]:
        """Return the newest end of every (cell, repeat) that has one; a valid one stands whatever came after it."""
        found: dict[tuple[str, int], Json] = {}
        for one in self.events:
            if one["event"] in ENDS:
                key = (one["cell"], one["repeat"])
                if found.get(key, {}).get("event") != FINISHED:
                    found[key] = one
        return found


def _event(entry: Any) -> Json:
    """Return one line of the journal; raise ValueError when it is none that we write."""
    if not isinstance(entry, dict) or not isinstance(entry.get("event"), str):
        raise ValueError("it does not say what happened")
    if entry["event"] in ("started", *ENDS) or "cell" in entry:
        for name, kind in (("cell", str), ("repeat", int), ("attempt", int)):
            if type(entry.get(name)) is not kind:
                raise ValueError(f"{name} is {entry.get(name)!r}")
    return entry


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other sweeps out of the folder; raise UserError that says who is in it. The lock ends with the process."""
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(f"{folder}: another sweep is at it ({file.read().strip() or 'unknown'})") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def save(folder: Path, content: Mapping[str, Any]) -> None:
    """Write sweep.json, whole or not at all."""
    fresh = folder / f".{SWEEP}"
    with open(fresh, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(folder / SWEEP)


def load(folder: Path) -> Json | None:
    """Return sweep.json, None when there is none."""
    try:
        return dict(json_of((folder / SWEEP).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / SWEEP} cannot be read ({error})") from None


def difference(before: Any, after: Any, path: str = "") -> str | None:
    """Return where two specs differ and how, as a person would say it; None when they do not."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(key for key in after if key not in before)]:
            where = f"{path}.{key}" if path else str(key)
            if key not in after:
                return f"{where} was {before[key]!r} and is gone"
            if key not in before:
                return f"{where} is new: {after[key]!r}"
            found = difference(before[key], after[key], where)
            if found:
                return found
        return None
    return None if before == after else f"{path} was {before!r} and is {after!r}"
