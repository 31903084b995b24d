"""What the tests against the real engine share: asking a server, comparing answers, reading its counters."""

from __future__ import annotations

import json
import os
import random
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from real.make_tiny_model import KV_BYTES_PER_TOKEN, SPECIAL_TOKENS, VOCABULARY

__all__ = ["KV_BYTES_PER_TOKEN", "ServerError", "ask", "counter", "counters", "differences", "get", "greedy", "prompts"]

#: Samples by their name with labels as Prometheus writes it, e.g. 'sglang:prompt_tokens_total{tp_rank="0"}'.
Counters = dict[str, float]


def engine_python() -> tuple[str, dict[str, str]]:
    """The Python that has the real engine, and the environment in which it runs on a CPU; skips the test without one.

    It is $PD_ENGINE_PYTHON, or what a deployment of inventory/local-sglang has installed.
    """
    root = Path(__file__).parents[2]
    found = [os.environ.get("PD_ENGINE_PYTHON"), *map(str, root.glob(".pd/install-cpu/sglang-[0-9]*/bin/python"))]
    python = next((path for path in found if path and Path(path).exists()), None)
    if python is None:
        pytest.skip("no real engine: set PD_ENGINE_PYTHON, or deploy inventory/local-sglang")
    shim = str(Path(__file__).with_name("shim"))
    return python, {**os.environ, "PYTHONPATH": shim, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}


class ServerError(Exception):
    """A server refused or did not answer; the message holds the URL, the status and the start of the body."""


def get(url: str, api_key: str | None = None, timeout_s: float = 10.0) -> str:
    """Body of a GET."""
    return _send(urllib.request.Request(url), api_key, timeout_s)


def ask(url: str, body: Mapping[str, object], api_key: str | None = None, timeout_s: float = 60.0) -> dict[str, Any]:
    """Post JSON, and return the JSON answered."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    answer = json.loads(_send(request, api_key, timeout_s))
    if not isinstance(answer, dict):
        raise ServerError(f"{url}: not a JSON object: {answer!r:.200}")
    return answer


def _send(request: urllib.request.Request, api_key: str | None, timeout_s: float) -> str:
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            text: str = response.read().decode()
            return text
    except urllib.error.HTTPError as error:
        raise ServerError(f"{request.full_url}: HTTP {error.code}: {error.read().decode()[:300]}") from error
    except OSError as error:
        raise ServerError(f"{request.full_url}: {error}") from error


def prompts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Random token ids, one prompt per length; no two share a first token, so none finds another in a prefix cache."""
    rng = random.Random(seed)
    usable = range(len(SPECIAL_TOKENS), VOCABULARY)
    firsts = rng.sample(usable, len(lengths))
    return [[first, *rng.choices(usable, k=length - 1)] for first, length in zip(firsts, lengths, strict=True)]


def greedy(
    url: str,
    prompt_ids: Sequence[Sequence[int]],
    output_tokens: int,
    *,
    concurrency: int = 4,
    api_key: str | None = None,
) -> list[list[int]]:
    """Token ids of greedy decoding at `url`, in the order of the prompts, `output_tokens` each.

    By /generate: sglang-router 0.3.2 refuses token ids as the prompt of /v1/completions (HTTP 422).
    """

    def one(prompt: Sequence[int]) -> list[int]:
        sampling = {"max_new_tokens": output_tokens, "temperature": 0, "ignore_eos": True}
        answer = ask(f"{url}/generate", {"input_ids": list(prompt), "sampling_params": sampling}, api_key)
        ids = [int(token) for token in answer["output_ids"]]
        if len(ids) != output_tokens:
            raise ServerError(f"{url}: {len(ids)} tokens instead of {output_tokens}")
        return ids

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(one, prompt_ids))


def differences(expected: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> list[str]:
    """One line for each pair of answers which differ, with the place where they part."""
    lines = []
    for index, (left, right) in enumerate(zip(expected, got, strict=True)):
        if list(left) != list(right):
            at = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
            lines.append(f"prompt {index} parts at token {at}: {list(left[at : at + 4])} != {list(right[at : at + 4])}")
    return lines


def counters(urls: str | Iterable[str]) -> Counters:
    """Every sample of /metrics of a server, or of several servers with the values of equal samples added up."""
    total: Counters = {}
    for url in [urls] if isinstance(urls, str) else urls:
        for line in get(f"{url}/metrics").splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                total[name] = total.get(name, 0.0) + float(value)
    return total


def counter(samples: Mapping[str, float], name: str) -> float:
    """Sum over all label sets of the metric `name`, e.g. 'sglang:prompt_tokens_total'. 0 when there is none."""
    return sum(value for key, value in samples.items() if key.partition("{")[0] == name)
