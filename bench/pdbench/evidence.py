"""What router and workers say about themselves before, during and after a load point.

Nothing here decides anything: `pdbench gate` does. A server that does not answer is recorded with its error and never
stops a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from pdbench import shapes
from pdbench.engines import Engine, engine, no_gpu
from pdbench.hostmetrics import Gpus, host_samples
from pdbench.load.errors import LoadError
from pdbench.reading import json_of
from pdbench.records import replacing
from pdbench.trust import trusting

_TIMEOUT = aiohttp.ClientTimeout(total=10)
_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(\{.*\})?\s+(\S+)(?:\s+-?\d+)?$")
_TYPE = re.compile(r"^#\s*TYPE\s+(\S+)\s+(\S+)")
#: what the gate needs of /server_info; the whole of it is hundreds of keys
_INFO = (
    *("version", "startup_time", "model_path", "served_model_name", "device", "dtype", "tp_size", "dp_size", "page_size"),
    *("kv_cache_dtype", "context_length", "max_running_requests", "max_total_num_tokens", "disable_radix_cache"),
    *("disaggregation_mode", "disaggregation_transfer_backend", "disaggregation_bootstrap_port", "emulated"),
    *("kv_bytes_per_token", "slow_down_s", "profiling", "faults", "emulated_transport", "emulated_profile"),
)
#: seconds in which a worker must have become idle, so that its cache can be emptied, and between two tries
_IDLE_WITHIN_S, _IDLE_POLL_S = 20.0, 0.2
#: the source of what the load generator's own host says, in server_metrics.parquet
_HOST = f"host:{socket.gethostname()}"
#: seconds that a profiler may take to write what it recorded
_PROFILE_WITHIN_S = 120.0


@dataclass(frozen=True)
class Pair:
    """A prefill and a decode worker by name, and where the prefill worker's bootstrap server listens."""

    prefill: str
    decode: str
    bootstrap_host: str
    bootstrap_port: int | None


@dataclass(frozen=True)
class Deployment:
    """What a plan says of where servers listen: names to URLs; ``gpus`` counts every GPU, each once.

    ``router_ca``: certificates (PEM) that vouch for a router that speaks TLS. ``no_gpu``: why no GPU takes part, ``truncated``:
    what makes the model another one than its name says; "" where it is not so.
    """

    ratio: str
    engine: Engine
    gpus: int
    router_url: str
    router_metrics_url: str
    workers: Mapping[str, str]
    pairs: tuple[Pair, ...] = ()
    router_ca: str = ""
    no_gpu: str = ""
    truncated: str = ""


def read_plan(path: Path) -> Deployment:
    """Read plan.json; raise LoadError with what is wrong."""
    try:
        plan = json_of(path.read_text(encoding="utf-8"))
        if fault := shapes.wrong(plan, shapes.PLAN):
            raise ValueError(fault)
        workers = plan["workers"]
        router_ca = str(plan["router"].get("tls_ca") or "")
        if router_ca:
            trusting(router_ca)
        by_name = {str(worker["name"]): worker for worker in workers}
        return Deployment(
            ratio=str(plan["ratio"]),
            engine=engine(plan.get("engine")),
            # Workers that share a GPU do not make it two.
            gpus=len({(rank["host"], gpu) for worker in workers for rank in worker["ranks"] for gpu in rank["gpus"]}),
            router_url=str(plan["router"]["url"]).rstrip("/"),
            router_metrics_url=str(plan["router"].get("metrics_url") or ""),
            router_ca=router_ca,
            workers={name: str(worker["url"]).rstrip("/") for name, worker in by_name.items()},
            no_gpu=no_gpu(bool(plan.get("emulated")), bool(plan.get("on_cpu"))),
            truncated=str(plan.get("truncated") or ""),
            pairs=tuple(_pair(by_name, pair["prefill"], pair["decode"]) for pair in plan.get("pairs") or []),
        )
    except OSError as why:
        raise LoadError(f"cannot read the plan {path}: {why.strerror or why}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as why:
        raise LoadError(f"{path} is no plan.json as `plan.yml` writes it: {type(why).__name__} {why}") from None


def _pair(workers: Mapping[str, Mapping[str, Any]], prefill: str, decode: str) -> Pair:
    front = workers[prefill]
    return Pair(prefill, workers[decode]["name"], urlsplit(front["url"]).hostname or "", front["ranks"][0].get("bootstrap_port"))


def parse_metrics(text: str) -> dict[str, float]:
    """Return ``{"name{labels}": value}`` of a Prometheus page: counters, gauges and a histogram's _sum and _count.

    Buckets, quantiles, creation times and values that are no finite number are left out.
    """
    kinds: dict[str, str] = {}
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            if match := _TYPE.match(line):
                kinds[match[1]] = match[2]
            continue
        match = _SAMPLE.match(line)
        if not match:
            continue
        name, labels = match[1], match[2] or ""
        compound = kinds.get(name) in ("histogram", "summary")
        if compound or (name.endswith("_bucket") and kinds.get(name.removesuffix("_bucket")) == "histogram"):
            continue
        if name.endswith("_created"):
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        if math.isfinite(value):
            found[name + labels] = value
    return found


class Evidence:
    """Asks the servers of one deployment; ``headers`` carry the key, if any, and ``admin`` that for what changes a worker."""

    def __init__(self, deployment: Deployment, headers: Mapping[str, str], admin: Mapping[str, str], pool: Executor) -> None:
        """Make ready; metric pages are parsed in ``pool``, away from the process that stamps."""
        self.deployment = deployment
        self._admin, self._pool = admin, pool
        # Each connection is used once: uvicorn drops idle ones after 5 s, and a POST that meets this is not sent again.
        trust = trusting(deployment.router_ca) if deployment.router_ca else True
        connector = aiohttp.TCPConnector(force_close=True, ssl=trust)
        self._session = aiohttp.ClientSession(headers=headers, timeout=_TIMEOUT, connector=connector, trust_env=False)
        self.rows: list[tuple[int, float, str, str, str, float]] = []

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def snapshot(self, t_s: float) -> dict[str, object]:
        """Return one side (``before`` or ``after``) of a point in evidence.json; ``t_s`` is its time in the point."""
        router, *workers = await asyncio.gather(self._router(), *(self._worker(url) for url in self.deployment.workers.values()))
        return {"t_s": t_s, "router": router, "workers": dict(zip(self.deployment.workers, workers, strict=True))}

    async def reset(self, done: dict[str, object]) -> None:
        """Bring every worker to its starting state, and put into ``done`` what came of it, by worker and step.

        ``full_speed``: a slowed scheduler is released, whether it was slowed or not: SGLang cannot be asked. ``profile``: a
        profiler is stopped only where the worker says that one runs ("none", "stopped"); where it does not say
        ("unknown"), SGLang answers an idle /stop_profile with an error, and with SGLANG_PROFILE_V2 its scheduler dies of
        it. ``flush``: caches are emptied, which a worker refuses with 400 while requests run. "ok", or why not.
        """
        names = list(self.deployment.workers.items())
        found = await asyncio.gather(*(self._reset(url) for _, url in names))
        done.update(zip((name for name, _ in names), found, strict=True))

    async def _reset(self, url: str) -> dict[str, object]:
        engine, steps = self.deployment.engine, {}
        path, body = engine.full_speed
        if path:
            steps["full_speed"] = await self._told(url + path, body)
        if engine.stop_profile:
            steps["profile"] = await self._unprofiled(url, engine.stop_profile)
        if engine.flush:
            end = perf_counter() + _IDLE_WITHIN_S
            while (answer := await self._told(url + engine.flush)).startswith("HTTP 400") and perf_counter() < end:
                await asyncio.sleep(_IDLE_POLL_S)
            steps["flush"] = answer
        return dict(steps)

    async def _unprofiled(self, url: str, path: str) -> str:
        try:
            info = json_of(await self._text(f"{url}/server_info"))
        except (_Silent, ValueError):
            return "unknown"
        if not isinstance(info, dict) or "profiling" not in info:
            return "unknown"
        if not info["profiling"]:
            return "none"
        answer = await self._told(url + path, within_s=_PROFILE_WITHIN_S)
        return "stopped" if answer == "ok" else answer

    async def _told(self, url: str, body: Mapping[str, object] | None = None, within_s: float = 10.0) -> str:
        """Tell a worker to change; return "ok" for HTTP 200, else what came instead."""
        within = aiohttp.ClientTimeout(total=within_s)
        try:
            async with self._session.post(url, json=body, headers=self._admin, timeout=within) as response:
                text = " ".join((await response.text()).split())[:200]
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as why:
            return f"{type(why).__name__}: {why}".rstrip(": ")
        return "ok" if response.status == 200 else f"HTTP {response.status}{f': {text}' if text else ''}"

    async def scrape(self, point: int, start: float, every_s: float) -> None:
        """Append all metrics of all servers, and of this host, to ``rows`` every ``every_s`` seconds until cancelled."""
        pages = {name: f"{url}/metrics" for name, url in self.deployment.workers.items()}
        if self.deployment.router_metrics_url:
            pages["router"] = self.deployment.router_metrics_url
        gpus = Gpus()
        await gpus.start(every_s)
        try:
            while True:
                begun = perf_counter()
                await asyncio.gather(*(self._scrape(point, start, name, url) for name, url in pages.items()))
                found = await asyncio.get_running_loop().run_in_executor(self._pool, host_samples)
                t_s = perf_counter() - start
                self.rows += [(point, t_s, _HOST, *sample) for sample in (*found, *gpus.take())]
                await asyncio.sleep(max(0.0, every_s - (perf_counter() - begun)))
        finally:
            await gpus.stop()

    async def _scrape(self, point: int, start: float, source: str, url: str) -> None:
        try:
            text = await self._text(url)
        except _Silent:
            return
        t_s = perf_counter() - start
        for series, value in (await self._parse(text)).items():
            name, _, labels = series.partition("{")
            self.rows.append((point, t_s, source, name, labels.removesuffix("}"), value))

    async def _router(self) -> dict[str, object]:
        url = self.deployment.router_url
        workers, readiness, errors = await self._both(f"{url}/workers", f"{url}/readiness", json.loads, json.loads)
        listed = workers.get("workers") if isinstance(workers, dict) else workers
        metrics: dict[str, float] = {}
        # Nothing is judged by them, so a router without is no error.
        if self.deployment.router_metrics_url:
            with contextlib.suppress(_Silent):
                metrics = await self._parse(await self._text(self.deployment.router_metrics_url))
        return {"workers": listed or [], "readiness": readiness or {}, "metrics": metrics, "error": errors}

    async def _worker(self, url: str) -> dict[str, object]:
        info, text, errors = await self._both(url + self.deployment.engine.info, f"{url}/metrics", json.loads, str)
        chosen = {key: info[key] for key in _INFO if key in info} if isinstance(info, dict) else {}
        metrics = await self._parse(text) if isinstance(text, str) else {}
        return {"url": url, "server_info": chosen, "metrics": metrics, "error": errors}

    async def _both(
        self, one: str, two: str, read_one: Callable[[str], object], read_two: Callable[[str], object]
    ) -> tuple[object, object, str]:
        async def ask(url: str, read: Callable[[str], object]) -> tuple[object, str]:
            try:
                return read(await self._text(url)), ""
            except _Silent as why:
                return None, str(why)
            except ValueError:
                return None, f"{url}: the answer is no JSON"

        (first, error), (second, other) = await asyncio.gather(ask(one, read_one), ask(two, read_two))
        return first, second, "; ".join(filter(None, (error, other)))

    async def _text(self, url: str) -> str:
        try:
            async with self._session.get(url) as response:
                text = await response.text()
                # A router that is not ready says so with 503 and a body worth keeping.
                if response.status != 200 and not (response.status == 503 and url.endswith("/readiness")):
                    raise _Silent(f"{url}: HTTP {response.status}")
                return text
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as why:
            raise _Silent(f"{url}: {why or type(why).__name__}") from None

    async def _parse(self, text: str) -> dict[str, float]:
        return await asyncio.get_running_loop().run_in_executor(self._pool, parse_metrics, text)


class _Silent(Exception):
    """A server that gave no usable answer; the message says which and why."""


def write_metrics(path: Path, rows: list[tuple[int, float, str, str, str, float]]) -> None:
    """Write server_metrics.parquet (docs/architecture.md); raise OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = (pa.int32(), pa.float64(), pa.string(), pa.string(), pa.string(), pa.float64())
    names = ("point", "t_s", "source", "name", "labels", "value")
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(names)
    arrays = [pa.array(column, type=kind) for column, kind in zip(columns, kinds, strict=True)]
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_arrays(arrays, names=list(names)), temporary)
