"""Runs a peer after our own run, once a load point, and puts what came of it into the run's folder.

`tools/NAME/` keeps the peer's own files and what it said, ``summary.json`` gets the figures under ``tools``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pdbench.peers import vocabulary
from pdbench.peers.commands import TOOLS, CannotAskError, Place, command, shown
from pdbench.peers.read import READERS, NotReadableError
from pdbench.reading import json_of
from pdbench.records import write_json

Json = dict[str, Any]
#: a peer may take so many times as long as we did, and so many seconds for its start and its statistics
_TIMES, _SECONDS = 10, 600.0


class CannotRunError(Exception):
    """The peer cannot be run beside this run; the message is for the user."""


@dataclass(frozen=True)
class Peer:
    """Which ``tool``, run by which ``python``, against which ``url`` and ``model``; ``tokenizer``: tokenizer.json, if any."""

    tool: str
    python: str
    url: str
    model: str
    tokenizer: Path | None = None
    api_key: str = ""


def run(folder: Path, peer: Peer) -> Json:
    """Run the peer at every load point of the run in ``folder`` and return summary.json, which then has ``tools``.

    A load point that the peer could not measure has a ``problem`` in place of ``figures``. Raises CannotRunError, OSError.
    """
    summary = read_summary(folder)
    if peer.tokenizer is not None and not peer.tokenizer.is_file():
        raise CannotRunError(f"--tokenizer {peer.tokenizer}: there is no such file")
    own = folder / "tools" / peer.tool
    own.mkdir(parents=True, exist_ok=True)
    tokenizer = own / "tokenizer"
    vocabulary.make(tokenizer, peer.tokenizer)
    place = Place(peer.python, peer.url.rstrip("/"), peer.model, tokenizer, own)
    points = list(summary.get("points") or [summary])
    try:
        outcomes = []
        for done, point in enumerate(points):
            say = f"{TOOLS[peer.tool].title}: load point {done + 1} of {len(points)}"
            (folder / "tools" / "progress").write_text(say, encoding="utf-8")
            outcomes.append(_point(place, peer, str(summary.get("api")), {"point": done, **point}))
    finally:
        shutil.rmtree(tokenizer, ignore_errors=True)
        (folder / "tools" / "progress").unlink(missing_ok=True)
    found = {"version": TOOLS[peer.tool].version, "points": outcomes}
    write_json(own / "tool.json", found)
    summary["tools"] = {**(summary.get("tools") or {}), peer.tool: found}
    write_json(folder / "summary.json", summary)
    return summary


def read_summary(folder: Path) -> Json:
    """Return summary.json of a run's folder; raise CannotRunError."""
    try:
        summary = json_of((folder / "summary.json").read_text(encoding="utf-8"))
        if not isinstance(summary, dict):
            raise ValueError("no JSON object")
    except OSError as why:
        raise CannotRunError(f"{folder} holds no finished run: summary.json: {why.strerror}") from None
    except ValueError as why:
        raise CannotRunError(f"{folder}/summary.json is not what `pdbench run` writes: {why}") from None
    return summary


def _point(place: Place, peer: Peer, api: str, point: Mapping[str, Any]) -> Json:
    number = point["point"]
    out, log = place.out / f"point-{number}.json", place.out / f"point-{number}.log"
    outcome: Json = {"point": number, "command": "", "seconds": 0.0, "figures": None, "problem": ""}
    try:
        argv = command(peer.tool, replace(place, out=out), api, point)
    except CannotAskError as why:
        return {**outcome, "problem": str(why)}
    # SGLang's client appends: what an earlier attempt left is no part of this one.
    out.unlink(missing_ok=True)
    limit = _TIMES * float(point.get("duration_s") or 0.0) + _SECONDS
    begun = time.monotonic()
    code = _call(argv, log, place.out, peer.api_key, limit)
    outcome |= {"command": shown(argv), "seconds": round(time.monotonic() - begun, 3)}
    if code:
        return {**outcome, "problem": f"{code}; its output is in {_below(log)}{_last(log)}"}
    try:
        figures = READERS[peer.tool](out.read_text(encoding="utf-8"), int(point["num_requests"]))
    except (OSError, ValueError, NotReadableError) as why:
        said = f"it wrote no {out.name}" if isinstance(why, FileNotFoundError) else f"{out.name}: {why}"
        return {**outcome, "problem": f"{said}; its output is in {_below(log)}{_last(log)}"}
    bad = figures["failed"]
    problem = f"{bad} of {point['num_requests']} requests failed; its output is in {_below(log)}" if bad else ""
    return {**outcome, "figures": figures, "problem": problem}


def _below(log: Path) -> str:
    return "/".join(log.parts[-3:])


def _last(log: Path) -> str:
    """Return the last line of what the peer said, which is where Python puts the reason."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f" and ends with: {lines[-1][:200]}" if lines else ""


def _call(argv: list[str], log: Path, folder: Path, api_key: str, limit_s: float) -> str:
    """Run a command to its end; return "" when it went well, else what became of it."""
    # It fetches nothing, and leaves nothing outside the run's folder.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(folder / "tokenizer" / "hub")}
    environment |= {"PYTHONUNBUFFERED": "1", "OPENAI_API_KEY": api_key, "API_KEY": api_key}
    if not api_key:
        del environment["OPENAI_API_KEY"], environment["API_KEY"]
    with log.open("wb") as said:
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        except OSError as why:
            return f"it does not start: {argv[0]}: {why.strerror}"
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"it did not end within {limit_s:.0f} s and was stopped"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return f"it ended with exit code {code}" if code else ""
