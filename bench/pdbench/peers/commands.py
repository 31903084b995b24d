"""How the peers are called: one call a load point, with the load that ours had."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = Mapping[str, Any]
SHIMS = Path(__file__).parent / "shims"
#: the quantiles that both peers can be asked for
QUANTILES = (50, 90, 95, 99)


class CannotAskError(Exception):
    """The peer has no way to send this load; the message is for the user."""


@dataclass(frozen=True)
class Place:
    """Where a peer runs: its ``python``, the router's ``url``, the ``model``, the ``tokenizer`` folder, the file ``out``."""

    python: str
    url: str
    model: str
    tokenizer: Path
    out: Path


def _lengths(point: Json) -> tuple[int, int]:
    """Return tokens of a prompt and of an answer; raise CannotAskError for what is not the same for all requests."""
    for key in ("trace", "dataset", "conversation", "prefix_len", "request_rate_to"):
        if point.get(key):
            raise CannotAskError(f"{key.replace('_', ' ')} of load point {point.get('point', 0)}: this tool cannot send that")
    found = []
    for key in ("isl", "osl"):
        text = str(point.get(key))
        if not text.isdecimal():
            raise CannotAskError(f"{key} {text}: this tool is given one length, such as 512, not a distribution")
        found.append(int(text))
    return found[0], found[1]


def _pace(point: Json) -> tuple[int | None, float | None]:
    concurrency, rate = point.get("concurrency"), point.get("request_rate")
    if (concurrency is None) == (rate is None):
        raise CannotAskError(f"load point {point.get('point', 0)} has neither a concurrency nor a request rate alone")
    return concurrency, rate


def _sglang(place: Place, api: str, point: Json, seed: int) -> list[str]:
    (isl, osl), (concurrency, rate) = _lengths(point), _pace(point)
    if rate is not None and point.get("arrival") != "poisson":
        raise CannotAskError(f"arrival {point.get('arrival')}: SGLang's bench client sends poisson arrivals alone")
    backend = {"completions": "sglang-oai", "chat": "sglang-oai-chat", "generate": "sglang"}[api]
    argv = [place.python, str(SHIMS / "sglang_client.py"), "--backend", backend, "--base-url", place.url]
    argv += ["--model", place.model, "--tokenizer", str(place.tokenizer), "--dataset-name", "random-ids"]
    # The ratio is that of the shortest to the longest: all are as long as asked.
    argv += ["--random-input-len", str(isl), "--random-output-len", str(osl), "--random-range-ratio", "1"]
    argv += ["--num-prompts", str(point["num_requests"]), "--seed", str(seed), "--warmup-requests", "0", "--disable-tqdm"]
    argv += ["--max-concurrency", str(concurrency)] if rate is None else ["--request-rate", f"{rate:g}"]
    return [*argv, "--output-file", str(place.out)]


def _vllm(place: Place, api: str, point: Json, seed: int) -> list[str]:
    (isl, osl), (concurrency, rate) = _lengths(point), _pace(point)
    if api == "generate":
        raise CannotAskError("api generate: vLLM's bench client has the OpenAI APIs alone")
    arrival = str(point.get("arrival"))
    if rate is not None and arrival != "poisson" and not arrival.startswith("gamma:"):
        raise CannotAskError(f"arrival {arrival}: vLLM's bench client sends poisson and gamma arrivals")
    backend, path = {"completions": ("openai", "/v1/completions"), "chat": ("openai-chat", "/v1/chat/completions")}[api]
    argv = [place.python, str(SHIMS / "vllm_client.py"), "--backend", backend, "--base-url", place.url, "--endpoint", path]
    argv += ["--model", place.model, "--tokenizer", str(place.tokenizer), "--dataset-name", "random", "--ignore-eos"]
    argv += ["--random-input-len", str(isl), "--random-output-len", str(osl), "--random-range-ratio", "0"]
    argv += ["--num-prompts", str(point["num_requests"]), "--seed", str(seed), "--temperature", "0", "--disable-tqdm"]
    argv += ["--ready-check-timeout-sec", "0", "--num-warmups", "0", "--percentile-metrics", "ttft,tpot,itl,e2el"]
    argv += ["--metric-percentiles", ",".join(map(str, QUANTILES)), "--save-result"]
    if rate is None:
        argv += ["--max-concurrency", str(concurrency)]
    else:
        argv += ["--request-rate", f"{rate:g}", "--burstiness", arrival.partition(":")[2] or "1"]
    return [*argv, "--result-dir", str(place.out.parent), "--result-filename", place.out.name]


@dataclass(frozen=True)
class Tool:
    """A peer: what people call it, the version that `requirements/bench-NAME-no-deps.txt` pins, how it is called."""

    title: str
    version: str
    command: Callable[[Place, str, Json, int], list[str]]


TOOLS = {
    "sglang": Tool("SGLang's bench client", "0.5.23", _sglang),
    "vllm": Tool("vLLM's bench client", "0.33.0", _vllm),
}


def command(tool: str, place: Place, api: str, point: Json) -> list[str]:
    """Return the peer's command for a load point of summary.json; raise CannotAskError.

    Its seed is ours and the point's number, so that no point's prompts are in the caches from an earlier one.
    """
    return TOOLS[tool].command(place, api, point, int(point.get("seed") or 0) * 1000 + int(point.get("point") or 0))


def shown(argv: Sequence[str]) -> str:
    """Return a command as it is kept in the records."""
    return " ".join(argv)
