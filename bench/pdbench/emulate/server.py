"""The HTTP side of an emulated worker: the endpoints that routers, clients and monitoring of SGLang 0.5.23 use."""

from __future__ import annotations

import asyncio
import errno
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from datetime import UTC, datetime
from typing import TypeVar

from aiohttp import web

from pdbench import __version__
from pdbench.emulate.asks import Api, Ask, BadAskError, Body, read
from pdbench.emulate.engine import MODES, Engine, WorkerConfig, now
from pdbench.emulate.handshake import HandshakeError, bootstrap_app
from pdbench.emulate.replies import DONE, Reply, openai_error

log = logging.getLogger("pdbench.emulate")

VERSION = f"{__version__}+emulated"
MAX_BODY_BYTES = 256 * 2**20
#: As in SGLang's `utils/auth.py`: probes and Prometheus need no key.
OPEN_PREFIXES = ("/health", "/ready", "/metrics")
_LOAD_SECTIONS = {"core", "memory", "spec", "lora", "disagg", "queues", "all"}

_T = TypeVar("_T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class CannotListenError(Exception):
    """An address or port that cannot be listened on."""


class Server:
    """One worker's HTTP server, and its bootstrap server when it is a prefill."""

    def __init__(self, config: WorkerConfig) -> None:
        """Prepare; needs a running event loop."""
        self.config = config
        self.engine = Engine(config)
        self.ready = False
        self._born = time.time()
        self._runners: list[web.AppRunner] = []

    async def start(self) -> None:
        """Listen, then become ready after the profile's start-up time. Raises CannotListenError."""
        await self._listen(self._app(), self.config.port, "--port")
        if self.config.role == "prefill":
            await self._listen(bootstrap_app(self.engine.rooms), self.config.bootstrap_port, "--bootstrap-port")
        await asyncio.sleep(self.config.profile.startup_s)
        self.ready = True

    async def _listen(self, app: web.Application, port: int, option: str) -> None:
        # handler_cancellation: a client that leaves must stop its request, as it does in SGLang
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.3)
        await runner.setup()
        self._runners.append(runner)
        try:
            await web.TCPSite(runner, self.config.host, port, backlog=4096).start()
        except OSError as problem:
            place = f"{self.config.host}:{port}"
            if problem.errno == errno.EADDRINUSE:
                message = f"{option} {place} is taken by another process; stop that one or choose another port"
            else:
                message = f"cannot listen on {place} (--host, {option}): {problem}"
            raise CannotListenError(message) from None

    async def stop(self, grace_s: float = 0.5) -> None:
        """Accept no more, give running requests a moment, drop the rest."""
        self.ready = False
        for runner in self._runners:
            for site in list(runner.sites):
                await site.stop()
        deadline = now() + grace_s
        while self.engine.requests and now() < deadline:
            await asyncio.sleep(0.02)
        for runner in self._runners:
            await runner.cleanup()
        await self.engine.close()

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._guard])
        app.add_routes(
            [
                web.get("/ready", self._probe),
                web.get("/health", self._probe),
                web.get("/health_generate", self._probe),
                web.get("/server_info", self._server_info),
                web.get("/get_server_info", self._server_info),
                web.get("/model_info", self._model_info),
                web.get("/get_model_info", self._model_info),
                web.get("/v1/models", self._models),
                web.get("/v1/loads", self._loads),
                web.get("/get_load", self._old_load),
                web.get("/metrics", self._metrics),
                web.route("*", "/flush_cache", self._flush_cache),
                web.post("/generate", self._route("generate")),
                web.post("/v1/completions", self._route("completions")),
                web.post("/v1/chat/completions", self._route("chat")),
            ]
        )
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.config.api_key is not None and not request.path.startswith(OPEN_PREFIXES):
            scheme, _, key = request.headers.get("Authorization", "").partition(" ")
            same = hmac.compare_digest(key.encode(), self.config.api_key.encode())
            if request.method != "OPTIONS" and (scheme.lower() != "bearer" or not same):
                return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    # ---- what the worker says about itself

    async def _probe(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.ready else 503)

    async def _server_info(self, _: web.Request) -> web.Response:
        config = self.config
        return web.json_response(
            {
                "emulated": True,
                "emulated_by": "pdbench emulate: no model, no GPU, constant rates from a profile",
                "emulated_profile": config.profile.description,
                "emulated_transport": config.transport,
                "version": VERSION,
                "model_path": config.model_path,
                "tokenizer_path": config.model_path,
                "served_model_name": config.served_model_name,
                "host": config.host,
                "port": config.port,
                "tp_size": config.tp_size,
                "dp_size": 1,
                "context_length": config.context_length,
                "max_running_requests": config.max_running_requests,
                "disaggregation_mode": MODES[config.role],
                "disaggregation_bootstrap_port": config.bootstrap_port,
                "disaggregation_transfer_backend": "emulated",
                "startup_time": self._born,
                "internal_states": [{"effective_max_running_requests_per_dp": config.max_running_requests}],
            }
        )

    async def _model_info(self, _: web.Request) -> web.Response:
        config = self.config
        return web.json_response(
            {
                "model_path": config.model_path,
                "served_model_name": config.served_model_name,
                "tokenizer_path": config.model_path,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": "default",
                "disaggregation_mode": MODES[config.role],
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": "emulated",
                "architectures": ["Emulated"],
            }
        )

    async def _models(self, _: web.Request) -> web.Response:
        name = self.config.served_model_name
        card = {
            "id": name,
            "object": "model",
            "created": int(self._born),
            "owned_by": "sglang",
            "root": name,
            "parent": None,
            "max_model_len": self.config.context_length,
        }
        return web.json_response({"object": "list", "data": [card]})

    async def _loads(self, request: web.Request) -> web.Response:
        asked = request.query.get("include")
        sections = {part.strip() for part in asked.split(",")} if asked else {"all"}
        if not sections <= _LOAD_SECTIONS:
            return web.json_response(
                {"detail": f"Invalid include sections: {sections - _LOAD_SECTIONS}. Valid: {sorted(_LOAD_SECTIONS)}"},
                status=400,
            )
        metrics, every = self.engine.metrics, "all" in sections
        gauge = {name: int(getattr(metrics, name).values[""]) for name in ("running", "queue")}
        load: Body = {
            "timestamp": time.time(),
            "dp_rank": 0,
            "num_running_reqs": gauge["running"],
            "num_waiting_reqs": gauge["queue"],
            "num_total_tokens": self.engine.tokens_held,
            "max_running_requests": self.config.max_running_requests,
        }
        if every or "disagg" in sections:
            load["disaggregation"] = {
                "mode": MODES[self.config.role],
                "prefill_bootstrap_queue_reqs": int(metrics.bootstrap_queue.values[""]),
                "prefill_inflight_queue_reqs": int(metrics.inflight_queue.values[""]),
                "decode_prealloc_queue_reqs": int(metrics.prealloc_queue.values[""]),
                "decode_transfer_queue_reqs": int(metrics.transfer_queue.values[""]),
                "decode_retracted_queue_reqs": 0,
                "kv_transfer_speed_gb_s": self.engine.last_kv_speed_gb_s,
                "kv_transfer_latency_ms": self.engine.last_kv_latency_ms,
            }
        if every or "queues" in sections:
            load["queues"] = {
                "waiting": gauge["queue"],
                "grammar": 0,
                "paused": 0,
                "retracted": 0,
                "prealloc_ready": 0,
            }
        return web.json_response(
            {
                "timestamp": datetime.now(UTC).isoformat(),
                "version": VERSION,
                "accelerator": "emulated",
                "num_accelerators": self.config.tp_size,
                "loads": [load],
            }
        )

    async def _old_load(self, _: web.Request) -> web.Response:
        # gone from SGLang 0.5.23, but sglang-router 0.3.2 still asks for it under power_of_two
        waiting = int(self.engine.metrics.queue.values[""])
        return web.json_response(
            [
                {
                    "dp_rank": 0,
                    "num_reqs": self.engine.requests,
                    "num_waiting_reqs": waiting,
                    "num_tokens": self.engine.tokens_held,
                }
            ]
        )

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self.engine.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _flush_cache(self, request: web.Request) -> web.Response:
        if request.method not in ("GET", "POST"):
            raise web.HTTPMethodNotAllowed(request.method, ["GET", "POST"])
        try:
            wait_s = float(request.query.get("timeout", "0"))
        except ValueError:
            wait_s = -1.0
        if not 0 <= wait_s < float("inf"):
            return web.Response(text="timeout must be a number of seconds, 0 or more\n", status=422)
        deadline = now() + wait_s
        while self.engine.requests and now() < deadline:
            await asyncio.sleep(0.02)
        if self.engine.requests:
            return web.Response(text=f"Flush cache failed: {self.engine.requests} requests are running.\n", status=400)
        return web.Response(text="Cache flushed.\n(An emulated worker has no prefix cache: nothing was in it.)\n")

    # ---- generation

    def _route(self, api: Api) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                ask = await self._read(api, request)
            except BadAskError as problem:
                log.error("%s refused: %s", request.path, problem)
                return _failure(api, str(problem), 400)
            if not self.ready:
                return _failure(api, "the worker is starting or stopping", 503)
            return await (self._stream(ask, request) if ask.stream else self._whole(ask))

        return handle

    async def _read(self, api: Api, request: web.Request) -> Ask:
        if request.content_type != "application/json":
            raise BadAskError(f"Content-Type must be application/json, not {request.content_type}")
        try:
            body = json.loads(await request.read())
        except ValueError as problem:
            raise BadAskError(f"the body is not JSON: {problem}") from None
        ask = read(api, body, self.config.served_model_name, self.config.context_length)
        for item in ask.items:
            self.engine.check(item)
        return ask

    async def _whole(self, ask: Ask) -> web.Response:
        arrival = now()

        async def one(place: int) -> tuple[bytes, int, float]:
            async with self.engine.request(ask.items[place], stream=False) as running:
                await running.rest()
            return running.digest, running.sent, now() - arrival

        try:
            done = await _all(one(place) for place in range(len(ask.items)))
        except HandshakeError as failure:
            log.error("%s", failure)
            return _failure(ask.api, str(failure), 500)
        digests, tokens, seconds = (list(part) for part in zip(*done, strict=True))
        return web.json_response(Reply(ask).whole(digests, tokens, seconds))

    async def _stream(self, ask: Ask, request: web.Request) -> web.StreamResponse:
        reply, arrival = Reply(ask), now()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        if ask.api == "generate":  # SGLang sends these headers at once, those of the OpenAI routes with the first event
            await response.prepare(request)

        async def one(place: int) -> int:
            async with self.engine.request(ask.items[place], stream=True) as running:
                events = reply.stream(place, running.digest)
                for index in range(running.tokens):
                    await running.until_due()
                    if not response.prepared:
                        await response.prepare(request)
                    await response.write(events.token(index, index == running.tokens - 1, now() - arrival))
                    running.count()
                return running.sent

        try:
            tokens = await _all(one(place) for place in range(len(ask.items)))
        except HandshakeError as failure:
            # as SGLang does, a stream that was accepted tells of its failure in an event, under status 200
            log.error("%s", failure)
            if not response.prepared:
                await response.prepare(request)
            await response.write(reply.stream(0, b"\0" * 32).error(str(failure), 500))
        else:
            if ask.include_usage and ask.api != "generate":
                await response.write(reply.usage_event(tokens))
        await response.write(DONE)
        return response


async def _all(parts: Iterable[Coroutine[object, object, _T]]) -> list[_T]:
    """Run all at once; when one fails, end the others and raise what it raised."""
    todo = list(parts)
    if len(todo) == 1:
        return [await todo[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part) for part in todo]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _failure(api: Api, message: str, status: int) -> web.Response:
    if api == "generate" and status == 400:
        return web.json_response({"error": {"message": message}}, status=status)
    return web.json_response(openai_error(message, status), status=status)
