"""Several clients that make one load: they meet at the first, compare clocks, and begin every load point at one moment.

Each sends its share (`split`) of the schedule that the seed gives all of them. The first listens, warms up, asks the servers
and says when a point begins; a line of JSON is a message. **Clocks** are compared as NTP does (RFC 5905, section 8): the other
asks what time it is, the fastest of 40 answers counts, and its round trip bounds the error by its half. That is done before
and after each point; what the clocks drifted apart in between is added to the bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from time import perf_counter
from typing import Any

from pdbench.records import write_json
from pdbench.run.share import SHARE, Alone, MeetError, Share, offset

Json = dict[str, Any]
#: seconds between the word to begin and the beginning: enough for it to reach every client's senders
_LEAD_S = 0.25
#: seconds that the clients may come after each other; between signs of life; of silence, after which one is given up
_GATHER_S, _BEAT_S, _SILENT_S = 180.0, 5.0, 60.0
_PINGS = 40


class _Together(Alone):
    """What the first client and the others have in common; ``lost`` is called with why they cannot go on together."""

    def __init__(self, share: Share, folder: Path, lost: Callable[[str], None]) -> None:
        self._share, self._path, self._lost = share, folder / SHARE, lost
        self._points: dict[int, Json] = {}
        self._fault = ""
        self._over = False
        self._tasks: list[asyncio.Task[None]] = []

    def _note(self, point: int, **what: object) -> None:
        self._points.setdefault(point, {"point": point}).update(what)
        told = {"schema": 1, "share": [self._share.number, self._share.of], "points": list(self._points.values())}
        write_json(self._path, told)

    def _broken(self, why: str) -> None:
        if not self._over and not self._fault:
            self._fault = why
            self._lost(why)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def close(self) -> None:
        self._over = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class First(_Together):
    """The first client: the others come to it."""

    def __init__(self, share: Share, folder: Path, lost: Callable[[str], None]) -> None:
        """Take who we are; nothing listens yet."""
        super().__init__(share, folder, lost)
        self._others: dict[int, asyncio.StreamWriter] = {}
        self._said: dict[int, set[str]] = {number: set() for number in range(2, share.of + 1)}
        self._news = asyncio.Event()
        self._load = ""
        self._server: asyncio.Server | None = None

    async def gather(self, load: str) -> None:
        """Listen, and wait for the others."""
        self._load = load
        where = f"{self._share.host}:{self._share.port}"
        try:
            self._server = await asyncio.start_server(self._serve, self._share.host, self._share.port)
        except OSError as why:
            raise MeetError(f"cannot listen on {where}, where the clients are to meet: {why.strerror or why}") from None
        try:
            await asyncio.wait_for(self._all_said("here"), _GATHER_S)
        except TimeoutError:
            absent = [f"client {n} of {self._share.of}" for n, said in self._said.items() if "here" not in said]
            raise MeetError(f"{' and '.join(absent)} did not come to {where} within {_GATHER_S:.0f} s") from None
        self._keep(_beat(self._tell))

    async def begin(self, point: int, start: float, asked: int) -> float:
        """Name the moment when all are ready."""
        await self._all_said(f"ready {point}")
        at = perf_counter() + _LEAD_S
        self._tell({"begin": at, "start": start})
        self._note(point, asked=asked, shift_s=0.0, offset_s=0.0, error_s=0.0, drift_s=0.0)
        return at

    async def ended(self, point: int, asked: int) -> None:
        """Wait for the others."""
        self._note(point, asked=asked)
        await self._all_said(f"ended {point}")

    async def go_on(self, why: str, last: bool) -> str:
        """Tell the others, who may leave when it was the last point."""
        self._over = last or bool(why)
        self._tell({"next": why, "over": self._over})
        return why

    async def close(self) -> None:
        """Let the others go; one that is still in the middle of something takes it as our end."""
        await super().close()
        if self._server is not None:
            self._server.close()
        for writer in self._others.values():
            writer.close()

    async def _all_said(self, word: str) -> None:
        while not self._fault and not all(word in said for said in self._said.values()):
            self._news.clear()
            await self._news.wait()
        if self._fault:
            raise MeetError(self._fault)

    def _tell(self, what: Json) -> None:
        for writer in self._others.values():
            _send(writer, what)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, name = 0, ""
        try:
            hello = await _read(reader)
            if not hmac.compare_digest(str(hello.get("key")).encode(), self._share.key.encode()):
                return
            number = int(hello["share"])
            name = f"client {number} of {self._share.of}"
            odd = self._odd(number, hello)
            _send(writer, {"error": odd} if odd else {"welcome": True})
            if odd:
                self._broken(f"{name}: {odd}")
                return
            self._others[number] = writer
            self._hear(number, "here")
            while True:
                told = await _read(reader)
                if "ping" in told:
                    _send(writer, {"now": perf_counter()})
                elif "said" in told:
                    self._hear(number, str(told["said"]))
        except (OSError, ValueError, KeyError, TypeError) as why:
            if number in self._others:
                self._broken(f"{name} is gone ({why or type(why).__name__})")
        finally:
            self._news.set()
            writer.close()

    def _odd(self, number: int, hello: Json) -> str:
        if hello.get("of") != self._share.of or number not in self._said:
            return f"--share {number}/{hello.get('of')} does not go with the first client's --share 1/{self._share.of}"
        if number in self._others:
            return f"there is another client with --share {number}/{self._share.of}"
        return "" if hello.get("load") == self._load else "it was given another load, seed or server than the first client"

    def _hear(self, number: int, word: str) -> None:
        self._said[number].add(word)
        self._news.set()


class Other(_Together):
    """A client that comes to the first."""

    def __init__(self, share: Share, folder: Path, lost: Callable[[str], None]) -> None:
        """Take who we are; nothing is connected yet."""
        super().__init__(share, folder, lost)
        self._writer: asyncio.StreamWriter | None = None
        self._told: asyncio.Queue[Json | None] = asyncio.Queue()
        self._pongs: asyncio.Queue[tuple[float, float] | None] = asyncio.Queue()
        self._clock = (0.0, 0.0)
        self.leads = False

    async def gather(self, load: str) -> None:
        """Come to the first client, which may still be busy with something else."""
        where, end = f"{self._share.host}:{self._share.port}", perf_counter() + _GATHER_S
        while True:
            try:
                reader, self._writer = await asyncio.wait_for(
                    asyncio.open_connection(self._share.host, self._share.port), max(0.1, end - perf_counter())
                )
                break
            except OSError as why:  # TimeoutError is one
                if perf_counter() > end:
                    said = why.strerror or "no answer"
                    raise MeetError(
                        f"the first client was not to be reached at {where} within {_GATHER_S:.0f} s: {said}"
                    ) from None
            await asyncio.sleep(0.2)
        self._say({"key": self._share.key, "share": self._share.number, "of": self._share.of, "load": load})
        try:
            answer = await _read(reader)
        except (OSError, ValueError):
            raise MeetError(f"what listens at {where} sent us away: is it the first client, with the same --meet-key?") from None
        if "error" in answer:
            raise MeetError(str(answer["error"]))
        self._keep(self._listen(reader))
        self._keep(_beat(self._say))

    async def begin(self, point: int, start: float, asked: int) -> float:
        """Compare clocks, say that we are ready, and hear when it begins."""
        self._clock = ahead, error = await self._compare()
        self._say({"said": f"ready {point}"})
        told = await self._hear()
        shift = start + ahead - float(told["start"])
        self._note(point, asked=asked, shift_s=shift, offset_s=ahead, error_s=error, drift_s=0.0)
        return float(told["begin"]) - ahead

    async def ended(self, point: int, asked: int) -> None:
        """Compare clocks again, and say so."""
        ahead, error = await self._compare()
        drift = ahead - self._clock[0]
        self._note(point, asked=asked, drift_s=drift, error_s=max(error, self._clock[1]) + abs(drift))
        self._say({"said": f"ended {point}"})

    async def go_on(self, why: str, last: bool) -> str:
        """Hear what the first decided."""
        return str((await self._hear())["next"])

    async def close(self) -> None:
        """Leave."""
        await super().close()
        if self._writer is not None:
            self._writer.close()

    def _say(self, what: Json) -> None:
        assert self._writer is not None
        _send(self._writer, what)

    async def _compare(self) -> tuple[float, float]:
        samples = []
        for _ in range(_PINGS):
            asked = perf_counter()
            self._say({"ping": 1})
            pong = await self._pongs.get()
            if pong is None:
                raise MeetError(self._fault)
            samples.append((asked, *pong))
        return offset(samples)

    async def _hear(self) -> Json:
        told = await self._told.get()
        if told is None:
            raise MeetError(self._fault)
        return told

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                told = await _read(reader)
                if "now" in told:
                    self._pongs.put_nowait((float(told["now"]), perf_counter()))
                elif "beat" not in told:
                    # Who has said this may leave.
                    self._over = bool(told.get("over"))
                    self._told.put_nowait(told)
        except (OSError, ValueError, TypeError) as why:
            self._broken(f"the first client is gone ({why or type(why).__name__})")
            self._pongs.put_nowait(None)
            self._told.put_nowait(None)


def join(share: Share, folder: Path, lost: Callable[[str], None]) -> Alone:
    """Return how the client that has ``share`` meets the others; ``folder`` is its run's."""
    if share.of == 1:
        return Alone()
    return (First if share.number == 1 else Other)(share, folder, lost)


async def _beat(tell: Callable[[Json], None]) -> None:
    while True:
        tell({"beat": 1})
        await asyncio.sleep(_BEAT_S)


def _send(writer: asyncio.StreamWriter, what: Json) -> None:
    with contextlib.suppress(OSError):  # who reads from it notices
        writer.write(json.dumps(what).encode() + b"\n")


async def _read(reader: asyncio.StreamReader) -> Json:
    """Return the next message; raise OSError when the other is gone or silent, ValueError when it is none of ours."""
    try:
        line = await asyncio.wait_for(reader.readline(), _SILENT_S)
    except TimeoutError:
        raise ConnectionError(f"nothing was heard of it for {_SILENT_S:.0f} s") from None
    if not line.endswith(b"\n"):
        raise ConnectionError("it closed the connection")
    told = json.loads(line)
    if not isinstance(told, dict):
        raise ValueError("no message")
    return told
