"""The workers that are profiled, and what they say of their load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from pdbench import shapes
from pdbench.load.errors import LoadError
from pdbench.reading import json_of

#: seconds for an answer of a worker whose scheduler does not sleep
ANSWER_S = 30.0


@dataclass(frozen=True)
class Target:
    """One worker: its name, URL, the folder (on its own hosts) that its traces go to, and how many ranks write one.

    ``unit``: what its traces and logs are called; a worker whose role may change is called by its port.
    """

    name: str
    url: str
    folder: str
    ranks: int
    unit: str


def read(path: Path, role: str, profile_id: str) -> tuple[Target, ...]:
    """Return the workers of a role from plan.json; raise LoadError with what is wrong.

    Traces go below the unit's working directory, which the engine may write and a container has, too.
    """
    try:
        plan = json_of(path.read_text(encoding="utf-8"))
        if fault := shapes.wrong(plan, shapes.PLAN):
            raise ValueError(fault)
        found = []
        for worker in plan["workers"]:
            if worker["role"] != role:
                continue
            homes = {plan["hosts"][rank["host"]]["state_dir"] for rank in worker["ranks"]}
            if len(homes) > 1:
                raise LoadError(
                    f"{worker['name']} has hosts with different state_dir ({', '.join(sorted(homes))}): make them alike"
                )
            unit = worker["ranks"][0]["unit"].removesuffix(".service")
            # An emulated worker is one process, whatever its GPUs; on CPU there are none.
            ranks = 1 if plan["emulated"] else sum(len(rank["gpus"]) for rank in worker["ranks"]) or 1
            folder = f"{homes.pop()}/run/{unit}/profiles/{profile_id}"
            found.append(Target(str(worker["name"]), str(worker["url"]).rstrip("/"), folder, ranks, unit.removeprefix("pd-")))
    except OSError as why:
        raise LoadError(f"cannot read the plan {path}: {why.strerror or why}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as why:
        if isinstance(why, LoadError):
            raise
        raise LoadError(f"{path} is no plan.json as `plan.yml` writes it: {type(why).__name__} {why}") from None
    if not found:
        raise LoadError(f"the deployment has no {role} worker (its ratio is {plan.get('ratio')}): deploy one like 1p1d")
    return tuple(found)


class AskError(Exception):
    """A worker did not do what it was asked; the message says what it answered."""


class Asker:
    """Sends control requests to workers; ``headers`` carry the key, if any, and ``admin`` that for what changes a worker."""

    def __init__(self, headers: Mapping[str, str], admin: Mapping[str, str]) -> None:
        """Make ready; a connection is used once, because uvicorn drops idle ones and a lost POST is not sent again."""
        self._admin = admin
        self._session = aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(force_close=True), trust_env=False)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def post(self, url: str, body: Mapping[str, object], within_s: float) -> None:
        """Tell a worker to change, and raise AskError unless it answers with 200."""
        within = aiohttp.ClientTimeout(total=within_s)
        try:
            async with self._session.post(url, json=body, headers=self._admin, timeout=within) as answer:
                text = " ".join((await answer.text()).split())[:300]
        except (TimeoutError, aiohttp.ClientError, OSError) as why:
            raise AskError(f"{url}: {type(why).__name__} {why}".rstrip(" ")) from None
        if answer.status != 200:
            raise AskError(f"{url}: HTTP {answer.status} {text}".rstrip())

    async def loads(self, url: str, within_s: float) -> list[Mapping[str, object]]:
        """Return `/v1/loads` of a worker, an entry a data-parallel rank; raise AskError."""
        try:
            async with self._session.get(f"{url}/v1/loads", timeout=aiohttp.ClientTimeout(total=within_s)) as answer:
                if answer.status != 200:
                    raise AskError(f"{url}/v1/loads: HTTP {answer.status}")
                told = await answer.json(content_type=None)
            return [dict(load) for load in told["loads"]]
        except (TimeoutError, aiohttp.ClientError, OSError) as why:
            raise AskError(f"{url}/v1/loads: {type(why).__name__} {why}".rstrip(" ")) from None
        except (ValueError, KeyError, TypeError):
            raise AskError(f"{url}/v1/loads: the answer is not SGLang's") from None


def gathered(loads: list[Mapping[str, object]]) -> int:
    """Return how many requests of a worker are in its decode batch or could be: running, or waiting with their KV cache there.

    `queues.waiting` of a decode worker counts those whose cache has arrived (srt/managers/load_snapshot.py); the transfer and
    preallocation queues, whose requests still wait for it, are counted apart.
    """
    found = 0
    for load in loads:
        queues = load.get("queues")
        waiting = queues.get("waiting", 0) if isinstance(queues, Mapping) else 0
        found += int(str(load.get("num_running_reqs", 0))) + int(str(waiting))
    return found


def room(loads: list[Mapping[str, object]], tokens: int) -> int | None:
    """Return how many requests of ``tokens`` tokens (prompt and output) a worker can run at once; None when it does not say."""
    most = 0
    for load in loads:
        slots, memory = load.get("max_running_requests"), load.get("max_total_num_tokens")
        limits = [int(str(slots))] if slots else []
        limits += [int(str(memory)) // tokens] if memory else []
        if not limits:
            return None
        most += min(limits)
    return most
