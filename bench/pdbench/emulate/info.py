"""What a worker says about itself: probes, server and model info, loads, metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

from aiohttp import web

from pdbench import __version__
from pdbench.emulate.asks import Body
from pdbench.emulate.config import MODES
from pdbench.emulate.engine import Engine
from pdbench.emulate.profiling import Profiler

VERSION = f"{__version__}+emulated"
_LOAD_SECTIONS = {"core", "memory", "spec", "lora", "disagg", "queues", "all"}


class Info:
    """The routes that only read."""

    def __init__(self, engine: Engine, profiler: Profiler, ready: Callable[[], bool]) -> None:
        """Speak for this engine; `ready` decides what probes say."""
        self._engine, self._profiler, self._ready = engine, profiler, ready
        self._born = time.time()

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [
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
        ]

    async def _probe(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self._ready() else 503)

    async def _server_info(self, _: web.Request) -> web.Response:
        engine, config = self._engine, self._engine.config
        return web.json_response(
            {
                "emulated": True,
                "emulated_by": "pdbench emulate: no model, no GPU, times from a performance model",
                "emulated_profile": config.profile.description,
                "emulated_transport": dict(engine.transports_seen),
                "faults": engine.faults.active,
                "slow_down_s": engine.slow_down_s,
                "profiling": self._profiler.running,
                "version": VERSION,
                "model_path": config.model_path,
                "tokenizer_path": config.model_path,
                "served_model_name": config.served_model_name,
                "host": config.host,
                "port": config.port,
                "tp_size": config.tp_size,
                "dp_size": 1,
                "page_size": 1,
                "kv_bytes_per_token": engine.rates.kv_bytes(1),
                "kv_cache_dtype": "auto" if config.profile.model.kv_bytes >= 2 else "fp8_e4m3",
                "disable_radix_cache": config.disable_radix_cache,
                "context_length": config.context_length,
                "max_running_requests": config.max_running_requests,
                "max_total_num_tokens": engine.kv_capacity_tokens,
                "disaggregation_mode": MODES[engine.role],
                "disaggregation_bootstrap_port": config.bootstrap_port,
                "disaggregation_transfer_backend": "emulated",
                "enable_pd_role_switch": config.enable_pd_role_switch,
                # as in SGLang, which shows both to whoever may ask
                "api_key": config.api_key,
                "admin_api_key": config.admin_api_key,
                "startup_time": self._born,
                "internal_states": [{"effective_max_running_requests_per_dp": config.max_running_requests}],
            }
        )

    async def _model_info(self, _: web.Request) -> web.Response:
        config = self._engine.config
        return web.json_response(
            {
                "model_path": config.model_path,
                "served_model_name": config.served_model_name,
                "tokenizer_path": config.model_path,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": "default",
                "disaggregation_mode": MODES[self._engine.role],
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": "emulated",
                "architectures": ["Emulated"],
            }
        )

    async def _models(self, _: web.Request) -> web.Response:
        name = self._engine.config.served_model_name
        card = {
            "id": name,
            "object": "model",
            "created": int(self._born),
            "owned_by": "sglang",
            "root": name,
            "parent": None,
            "max_model_len": self._engine.config.context_length,
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
        self._engine.refresh()
        load = self._core_load()
        for section, (name, part) in self._load_parts().items():
            if "all" in sections or section in sections:
                load[name] = part
        return web.json_response(
            {
                "timestamp": datetime.now(UTC).isoformat(),
                "version": VERSION,
                "accelerator": "emulated",
                "num_accelerators": self._engine.config.tp_size,
                "loads": [load],
            }
        )

    def _core_load(self) -> Body:
        engine, metrics = self._engine, self._engine.metrics
        queues = (metrics.queue, metrics.bootstrap_queue, metrics.prealloc_queue, metrics.transfer_queue, metrics.retracted)
        return {
            "timestamp": time.time(),
            "dp_rank": 0,
            "num_running_reqs": int(metrics.running.values[""]),
            # as in SGLang: all that are here and not in the running batch, those that wait for KV included
            "num_waiting_reqs": sum(int(queue.values[""]) for queue in queues),
            "num_used_tokens": engine.kv_used_tokens,
            "num_total_tokens": engine.tokens_held,
            "max_total_num_tokens": engine.kv_capacity_tokens,
            "max_running_requests": engine.config.max_running_requests,
            "token_usage": round(metrics.token_usage.values[""], 4),
            "gen_throughput": round(metrics.gen_throughput.value, 2),
            "cache_hit_rate": round(metrics.cache_hit_rate.values[""], 4),
        }

    def _load_parts(self) -> dict[str, tuple[str, Body]]:
        engine, metrics = self._engine, self._engine.metrics
        retracted = int(metrics.retracted.values[""])
        disagg: Body = {
            "mode": MODES[engine.role],
            "prefill_bootstrap_queue_reqs": int(metrics.bootstrap_queue.values[""]),
            "prefill_inflight_queue_reqs": int(metrics.inflight_queue.values[""]),
            "decode_prealloc_queue_reqs": int(metrics.prealloc_queue.values[""]),
            "decode_transfer_queue_reqs": int(metrics.transfer_queue.values[""]),
            "decode_retracted_queue_reqs": retracted if engine.role == "decode" else 0,
            "kv_transfer_speed_gb_s": engine.last_kv_speed_gb_s,
            "kv_transfer_latency_ms": engine.last_kv_latency_ms,
        }
        queues: Body = {
            "waiting": int(metrics.queue.values[""]),
            "grammar": 0,
            "paused": 0,
            "retracted": retracted,
            "prealloc_ready": 0,
        }
        # what it stands for, in SGLang's GB of 2^30 bytes; graphs have no size in the model
        capacity, model = engine.kv_capacity_tokens, engine.config.profile.model
        memory: Body = {
            "weight_gb": round(model.params * model.weight_bytes / engine.config.tp_size / 2**30, 3),
            "kv_cache_gb": round(engine.rates.layer_kv_bytes * model.layers * capacity / engine.config.tp_size / 2**30, 3),
            "graph_gb": 0.0,
            "token_capacity": capacity,
        }
        return {"memory": ("memory", memory), "disagg": ("disaggregation", disagg), "queues": ("queues", queues)}

    async def _old_load(self, _: web.Request) -> web.Response:
        # gone from SGLang 0.5.23, but sglang-router 0.3.2 still asks for it under power_of_two
        engine = self._engine
        engine.refresh()
        waiting = int(engine.metrics.queue.values[""])
        load = {"dp_rank": 0, "num_reqs": engine.requests, "num_waiting_reqs": waiting, "num_tokens": engine.tokens_held}
        return web.json_response([load])

    async def _metrics(self, _: web.Request) -> web.Response:
        self._engine.refresh()
        return web.Response(text=self._engine.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})
