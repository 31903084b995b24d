"""The three generate routes: read the request, hand its items to the engine, answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from aiohttp import web

from pdbench.emulate.asks import Api, Ask, BadAskError, read
from pdbench.emulate.engine import Engine
from pdbench.emulate.faults import Faults
from pdbench.emulate.handshake import HandshakeError
from pdbench.emulate.job import AbortedError, Job, now
from pdbench.emulate.replies import Ending, Reply, openai_error
from pdbench.emulate.stream import Counting, Streaming, Wire
from pdbench.reading import json_of

log = logging.getLogger("pdbench.emulate")

ROUTES: dict[str, Api] = {"/generate": "generate", "/v1/completions": "completions", "/v1/chat/completions": "chat"}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Generation:
    """The generate routes of one worker."""

    def __init__(self, engine: Engine, ready: Callable[[], bool]) -> None:
        """Serve this engine while `ready` says so."""
        self._engine, self._ready = engine, ready
        self._faults: Faults = engine.faults

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [web.post(path, self._route(api)) for path, api in ROUTES.items()]

    def _route(self, api: Api) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                ask = await self._read(api, request)
            except BadAskError as problem:
                log.error("%s refused: %s", request.path, problem)
                return _failure(api, str(problem), 400)
            if not self._ready():
                return _failure(api, "the worker is starting or stopping", 503)
            if self._faults.zero_tokens:
                return await self._nothing(ask, request)
            return await (self._stream(ask, request) if ask.stream else self._whole(ask))

        return handle

    async def _read(self, api: Api, request: web.Request) -> Ask:
        if request.content_type != "application/json":
            raise BadAskError(f"Content-Type must be application/json, not {request.content_type}")
        try:
            body = json_of(await request.read())
        except ValueError as problem:
            raise BadAskError(f"the body is not JSON: {problem}") from None
        config = self._engine.config
        ask = read(api, body, config.served_model_name, config.context_length)
        for item in ask.items:
            self._engine.check(item)
        return ask

    async def _whole(self, ask: Ask) -> web.Response:
        arrival = now()
        sinks = [Counting(self._faults) for _ in ask.items]
        jobs: list[Job] = []
        try:
            jobs += [self._engine.start(item, False, sink) for item, sink in zip(ask.items, sinks, strict=True)]
            aborted = await _all(jobs)
        except HandshakeError as failure:
            log.error("%s", failure)
            return _failure(ask.api, str(failure), failure.status)
        finally:
            self._drop(jobs)
        await self._while_hanging()
        parts = zip(sinks, jobs, aborted, strict=True)
        return web.json_response(Reply(ask).whole([sink.ending(job, arrival, why) for sink, job, why in parts]))

    async def _stream(self, ask: Ask, request: web.Request) -> web.StreamResponse:
        arrival = now()
        wire = Wire(request, self._faults, self._engine.metrics.slow_clients.inc)
        await wire.settle()
        reply = Reply(ask, wire.frame)
        if ask.api == "generate":  # SGLang sends these headers at once, those of the OpenAI routes with the first event
            wire.send(b"")
        places = range(len(ask.items))
        if self._faults.empty_first_chunk:
            wire.send(b"".join(reply.stream(place, bytes(32)).empty() for place in places))
        sinks = [Streaming(reply, place, wire, self._faults, arrival) for place in places]
        endings: list[Ending] | None = None
        jobs: list[Job] = []
        try:
            jobs += [self._engine.start(item, True, sink) for item, sink in zip(ask.items, sinks, strict=True)]
            aborted = await _all(jobs)
        except HandshakeError as failure:
            # as SGLang does, a stream that was accepted tells of its failure in an event, under status 200
            log.error("%s", failure)
            wire.send(reply.stream(0, bytes(32)).error(str(failure), failure.status))
        else:
            endings = []
            for sink, job, why in zip(sinks, jobs, aborted, strict=True):
                if why:
                    sink.abort(job, why)
                endings.append(sink.ending(job, arrival, why))
        finally:
            self._drop(jobs)
        await self._while_hanging()
        wire.finish(reply.end(endings))
        return wire

    async def _nothing(self, ask: Ask, request: web.Request) -> web.StreamResponse:
        """Answer as the fault `zero_tokens` wants it: all goes its way up to the first token, which nobody gets."""
        arrival = now()
        jobs: list[Job] = []
        try:
            jobs += [self._engine.start(replace(item, output_tokens=1), ask.stream, None) for item in ask.items]
            await _all(jobs)
        except HandshakeError as failure:
            return _failure(ask.api, str(failure), failure.status)
        finally:
            self._drop(jobs)
        endings = [Ending(bytes(32), 0, job.cached_tokens, now() - arrival) for job in jobs]
        if not ask.stream:
            return web.json_response(Reply(ask).whole(endings))
        wire = Wire(request, self._faults, self._engine.metrics.slow_clients.inc)
        await wire.settle()
        reply = Reply(ask, wire.frame)
        for place, ending in enumerate(endings):
            wire.send(reply.stream(place, ending.digest).last(ending, False))
        wire.finish(reply.end(endings))
        return wire

    async def _while_hanging(self) -> None:
        while self._faults.hanging:
            await asyncio.sleep(0.05)

    def _drop(self, jobs: Sequence[Job]) -> None:
        """End what is left of a request's items."""
        for job in jobs:
            if not job.done.done():
                job.done.add_done_callback(_seen)
                self._engine.abort(job)


def _seen(done: asyncio.Future[None]) -> None:
    # an exception that nobody asks for would be logged as lost
    if not done.cancelled():
        done.exception()


async def _all(jobs: Sequence[Job]) -> list[str]:
    """Wait for all items; return for each why it was aborted ("": it was not). Raises the first HandshakeError."""
    waiting = {job.done for job in jobs}
    while waiting:
        over, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
        for failure in [done.exception() for done in over]:
            if failure is not None and not isinstance(failure, AbortedError):
                raise failure
    ends = [job.done.exception() for job in jobs]
    return ["" if end is None else str(end) or "Aborted" for end in ends]


def _failure(api: Api, message: str, status: int) -> web.Response:
    if api == "generate" and status == 400:
        return web.json_response({"error": {"message": message}}, status=status)
    return web.json_response(openai_error(message, status), status=status)
