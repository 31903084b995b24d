"""The routes that change how a worker behaves: SGLang's control endpoints, and faults for tests."""

from __future__ import annotations

import asyncio
import json
import logging
import math

from aiohttp import web

from pdbench.emulate.asks import Body
from pdbench.emulate.config import MODES
from pdbench.emulate.engine import Engine
from pdbench.emulate.faults import BadFaultError
from pdbench.emulate.job import now
from pdbench.emulate.profiling import ProfileError, Profiler
from pdbench.emulate.replies import openai_error
from pdbench.reading import json_of

log = logging.getLogger("pdbench.emulate")

FAULT_PATH = "/emulated/fault"
#: SGLang's auth level ADMIN_OPTIONAL: with an admin key these take no other.
ADMIN_PATHS = frozenset(
    ("/flush_cache", "/start_profile", "/stop_profile", "/slow_down", "/pd_role_switch", "/abort_request", FAULT_PATH)
)
_BOTH = ("GET", "POST")


class _BadBodyError(ValueError):
    """A body that is not what the route takes: HTTP 422, as FastAPI answers it."""


class Control:
    """The control routes of one worker."""

    def __init__(self, engine: Engine, profiler: Profiler) -> None:
        """Control this engine."""
        self._engine, self._profiler = engine, profiler

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        both = {
            "/flush_cache": self._flush_cache,
            "/start_profile": self._start_profile,
            "/stop_profile": self._stop_profile,
            "/slow_down": self._slow_down,
        }
        return [
            *(web.route(method, path, handler) for path, handler in both.items() for method in _BOTH),
            web.post("/pd_role_switch", self._role_switch),
            web.post("/abort_request", self._abort),
            *(web.route(method, FAULT_PATH, self._fault) for method in ("GET", "POST", "DELETE")),
        ]

    async def _flush_cache(self, request: web.Request) -> web.Response:
        try:
            wait_s = float(request.query.get("timeout", "0"))
        except ValueError:
            wait_s = -1.0
        if not 0 <= wait_s < math.inf:
            return web.Response(text="timeout must be a number of seconds, 0 or more\n", status=422)
        engine = self._engine
        deadline = now() + wait_s
        while engine.requests and now() < deadline:
            await asyncio.sleep(0.02)
        if engine.requests:
            return web.Response(text=f"Flush cache failed: {engine.requests} requests are running.\n", status=400)
        return web.Response(text=f"Cache flushed.\n{engine.flush_cache()} tokens were in it.\n")

    async def _slow_down(self, request: web.Request) -> web.Response:
        try:
            body = await _body(request)
            if "forward_sleep_time" not in body:
                raise _BadBodyError("forward_sleep_time is missing: seconds before every step, or null for none")
            seconds = body["forward_sleep_time"]
            if seconds is not None and (
                isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not math.isfinite(seconds)
            ):
                raise _BadBodyError(f"forward_sleep_time must be a number of seconds or null, not {seconds!r}")
        except _BadBodyError as problem:
            return _refused(problem)
        pause = None if seconds is None or seconds <= 0 else float(seconds)
        self._engine.slow_down(pause)
        log.warning("slow_down: %s", "off" if pause is None else f"{pause:g} s before every step")
        return web.json_response(None)

    async def _start_profile(self, request: web.Request) -> web.Response:
        try:
            self._profiler.start(await _body(request))
        except _BadBodyError as problem:
            return _refused(problem)
        except ProfileError as problem:
            return web.json_response(openai_error(str(problem), problem.status), status=problem.status)
        return web.Response(text="Start profiling.\n")

    async def _stop_profile(self, _: web.Request) -> web.Response:
        try:
            files = self._profiler.stop()
        except (ProfileError, OSError) as problem:
            return web.json_response(openai_error(str(problem), 500), status=500)
        log.info("profile written: %s", ", ".join(map(str, files)))
        return web.Response(text="Stop profiling. This will take some time.\n")

    async def _role_switch(self, request: web.Request) -> web.Response:
        engine = self._engine
        try:
            wanted = (await _body(request)).get("new_role", "")
        except _BadBodyError as problem:
            return _refused(problem)
        old = MODES[engine.role]
        message, restore = "ok", False
        try:
            if not engine.config.enable_pd_role_switch:
                raise ValueError("--enable-pd-role-switch is not set on this server")
            if wanted not in ("prefill", "decode"):
                raise ValueError(f"invalid new_role={wanted!r}: it must be prefill or decode")
            if engine.role == "aggregated":
                raise ValueError("instance is not running in PD disaggregation mode")
            if wanted == old:
                message = "already in target role"
            elif engine.requests:
                raise ValueError("instance is not idle; drain all requests before switching")
            else:
                engine.switch_role(wanted)
                log.warning("role switched: %s -> %s", old, wanted)
        except ValueError as problem:
            message, restore = str(problem), True
        answer = {"success": not restore, "message": message, "old_role": old, "new_role": wanted, "safe_to_restore": restore}
        return web.json_response(answer, status=400 if restore else 200)

    async def _abort(self, request: web.Request) -> web.Response:
        try:
            body = await _body(request)
            rid, everything = body.get("rid") or "", body.get("abort_all") or False
            if not isinstance(rid, str) or not isinstance(everything, bool):
                raise _BadBodyError('rid must be text and abort_all true or false, like {"rid": "..."}')
        except _BadBodyError as problem:
            return _refused(problem)
        # as in SGLang, a rid that is not there is no error, and without both nothing happens
        for job in self._engine.jobs():
            if everything or (rid and job.item.rid == rid):
                self._engine.abort(job)
        return web.Response()

    async def _fault(self, request: web.Request) -> web.Response:
        faults = self._engine.faults
        if not self._engine.config.allow_faults:
            return web.json_response(
                {"error": "faults are refused: this worker was not started with --allow-faults, which is for tests"}, status=403
            )
        if request.method == "POST":
            try:
                fault = faults.add(await _body(request))
            except (_BadBodyError, BadFaultError) as problem:
                return web.json_response({"error": str(problem)}, status=400)
            log.warning("FAULT ON REQUEST: %s", json.dumps(fault.to_json()))
            if fault.kind == "die" and fault.left is None:
                asyncio.get_running_loop().call_later(0.05, faults.tokens_sent, 0)  # the answer goes out first
        elif request.method == "DELETE":
            faults.add({"kind": "clear"})
            log.warning("FAULTS CLEARED")
        return web.json_response({"faults": faults.active})


async def _body(request: web.Request) -> Body:
    """Return the JSON object of a request, {} for none. Raises _BadBodyError."""
    raw = await request.read()
    if not raw.strip():
        return {}
    try:
        body = json_of(raw)
    except ValueError as problem:
        raise _BadBodyError(f"the body is not JSON: {problem}") from None
    if not isinstance(body, dict):
        raise _BadBodyError("the body must be a JSON object")
    return body


def _refused(problem: _BadBodyError) -> web.Response:
    return web.json_response(openai_error(str(problem), 422), status=422)
