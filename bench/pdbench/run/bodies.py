"""The encoded requests of a load point, each made when it is asked for: before the run, one after the other, into a file.

A real trace has 145 million tokens of prompts. What is made does not depend on when, so nothing is held.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from pdbench.load.prompts import Piece, Prompts
from pdbench.load.requests import Request
from pdbench.records import MEASURE, WARMUP
from pdbench.run.asks import ask, frame


@dataclass(frozen=True)
class Target:
    """What every request of a run has in common."""

    api: str
    prompt: str
    model: str


@dataclass(frozen=True)
class Template:
    """A body that wants answers to earlier requests: bytes, and in between the indices of those requests."""

    parts: tuple[bytes | int, ...]

    def fill(self, texts: Mapping[int, str]) -> bytes:
        """Return the body; a text that is missing, because its request failed, is empty."""
        return b"".join(
            part if isinstance(part, bytes) else json.dumps(texts.get(part, "")).encode()[1:-1] for part in self.parts
        )


@dataclass(frozen=True)
class Bodies:
    """The bodies of a point's two phases, in the order of their requests."""

    warmup: PhaseBodies
    measure: PhaseBodies

    @classmethod
    def make(cls, target: Target, prompts: Prompts, number: int, serial: int, lists: Mapping[str, Sequence[Request]]) -> Bodies:
        """Return the bodies of point ``number``; ``serial`` counts the prompts of the points before this one."""
        warmup = PhaseBodies(target, prompts, number, serial, WARMUP, lists[WARMUP])
        return cls(warmup, PhaseBodies(target, prompts, number, serial + len(warmup), MEASURE, lists[MEASURE]))


@dataclass(frozen=True)
class PhaseBodies:
    """Bodies by the place of their request in the list."""

    target: Target
    prompts: Prompts
    number: int
    serial: int
    name: str
    requests: Sequence[Request]

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[bytes | Template]:
        return map(self._body, self.requests)

    def __getitem__(self, place: int) -> bytes | Template:
        return self._body(self.requests[place])

    def _body(self, request: Request) -> bytes | Template:
        target = self.target
        if request.content is not None:
            return ask(target.api, target.prompt, target.model, request.content, request.osl)
        pieces = request.pieces or (Piece(f"{self.name}/{request.index}", request.isl, serial=request.index),)
        head, tail = frame(target.api, target.prompt, target.model, request.osl)
        if target.prompt == "tokens":
            ids = b"".join(self._made(piece) for piece in pieces)
            return b"%b[%b]%b" % (head, ids[:-1], tail)
        if target.api != "chat" and self.prompts.added:
            pieces = (pieces[0]._replace(tokens=max(1, pieces[0].tokens - self.prompts.added)), *pieces[1:])
        parts = [head, *(self._messages(pieces) if target.api == "chat" else [b'"', *self._text(pieces), b'"']), tail]
        if all(isinstance(part, bytes) for part in parts):
            return b"".join(part for part in parts if isinstance(part, bytes))
        return Template(tuple(parts))

    def _made(self, piece: Piece) -> bytes:
        make = self.prompts.raw_tokens if self.target.prompt == "tokens" else self.prompts.raw_text
        # Named by the point: what one point leaves in the servers' caches is of no use to the next.
        return make(f"{self.number}/{piece.name}", None if piece.serial < 0 else self.serial + piece.serial, piece.tokens)

    def _text(self, pieces: Sequence[Piece]) -> list[bytes | int]:
        """Return the pieces one after the other with a blank between them."""
        parts: list[bytes | int] = []
        for piece in pieces:
            parts += [self._made(piece)] if piece.answer < 0 else [piece.answer, b" "]
        last = parts[-1]
        assert isinstance(last, bytes)
        return [*parts[:-1], last[:-1]]

    def _messages(self, pieces: Sequence[Piece]) -> list[bytes | int]:
        """Return the messages of a chat, one for every change of who speaks."""
        parts: list[bytes | int] = []
        for role, said in groupby(pieces, key=lambda piece: piece.role):
            parts += [b'%b{"role":"%b","content":"' % (b"," if parts else b"[", role.encode()), *self._text([*said]), b'"}']
        return [*parts, b"]"]
