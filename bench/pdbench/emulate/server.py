"""The HTTP side of an emulated worker: the endpoints that routers, clients and monitoring of SGLang 0.5.23 use."""

from __future__ import annotations

import asyncio
import errno

from aiohttp import web

from pdbench.emulate.auth import Level, allowed
from pdbench.emulate.config import WorkerConfig
from pdbench.emulate.control import ADMIN_PATHS, FAULT_PATH, Control
from pdbench.emulate.engine import Engine
from pdbench.emulate.generate import Generation, Handler
from pdbench.emulate.handshake import bootstrap_app
from pdbench.emulate.info import VERSION, Info
from pdbench.emulate.job import now
from pdbench.emulate.profiling import Profiler

__all__ = ["VERSION", "CannotListenError", "Server"]

MAX_BODY_BYTES = 256 * 2**20


class CannotListenError(Exception):
    """An address or port that cannot be listened on."""


class Server:
    """One worker's HTTP server, and its bootstrap server when it is or can become a prefill."""

    def __init__(self, config: WorkerConfig) -> None:
        """Prepare; needs a running event loop."""
        self.config = config
        self.engine = Engine(config)
        self.ready = False
        self._profiler = Profiler(self._stages)
        self.engine.on_step = self._profiler.step
        self._runners: list[web.AppRunner] = []

    async def start(self) -> None:
        """Listen, then become ready after the profile's start-up time. Raises CannotListenError."""
        await self._listen(self.app(), self.config.port, "--port")
        # as in SGLang, a worker that may become a prefill has its bootstrap server from the beginning
        if self.config.role == "prefill" or (self.config.enable_pd_role_switch and self.config.role == "decode"):
            meeting = bootstrap_app(self.engine.rooms)
            meeting.middlewares.append(self._hang)
            await self._listen(meeting, self.config.bootstrap_port, "--bootstrap-port")
        await asyncio.sleep(self.config.profile.engine.startup_s)
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

    def app(self) -> web.Application:
        """Return the worker's application."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._hang, self._guard])
        app.add_routes(Info(self.engine, self._profiler, self._is_ready).routes())
        app.add_routes(Control(self.engine, self._profiler).routes())
        app.add_routes(Generation(self.engine, self._is_ready).routes())
        return app

    def _is_ready(self) -> bool:
        return self.ready

    def _stages(self) -> list[str]:
        return [stage for stage, other in (("prefill", "decode"), ("decode", "prefill")) if self.engine.role != other]

    @web.middleware
    async def _hang(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        while self.engine.faults.hanging and request.path != FAULT_PATH:
            await asyncio.sleep(0.05)
        return await handler(request)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        config, path = self.config, request.path
        level: Level = "admin_optional" if path in ADMIN_PATHS else "normal"
        key = request.headers.get("Authorization")
        if not allowed(request.method, path, key, config.api_key, config.admin_api_key, level):
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)
