"""How long things take on an emulated worker: constant rates, no clock, no I/O.

All times are seconds on whatever clock the caller uses, so that the same model runs in real and in virtual time.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdbench.emulate.profile import Profile


@dataclass(frozen=True)
class PerfModel:
    """Constant prefill rate, constant decode step, constant KV bandwidth plus latency, for one transport."""

    profile: Profile
    transport: str

    def prefill_s(self, prompt_tokens: int) -> float:
        """Return the seconds that one prompt keeps the prefill busy: overhead + tokens / rate."""
        return self.profile.prefill_overhead_ms / 1e3 + prompt_tokens / self.profile.prefill_tokens_per_s

    def token_due(self, first_due: float, index: int) -> float:
        """Return when output token `index` (from 0) is due, on the clock of `first_due`: no sum, hence no drift."""
        return first_due + index * self.profile.decode_step_ms / 1e3

    def kv_bytes(self, prompt_tokens: int) -> int:
        """Return the bytes of KV cache that a prompt makes, over all GPUs of the worker."""
        return prompt_tokens * self.profile.kv_bytes_per_token

    def transfer_s(self, size_bytes: int) -> float:
        """Return the seconds from the start of a KV transfer to its end: latency + bytes / bandwidth."""
        way = self.profile.transports[self.transport]
        return way.latency_ms / 1e3 + size_bytes / (way.bandwidth_gb_per_s * 1e9)


class PrefillLine:
    """First in, first out, one prompt at a time: says when the prompt at the head of the line runs.

    Law: prompts that are never aborted finish at the same times as if nothing but the arithmetic took time.
    """

    def __init__(self, model: PerfModel) -> None:
        """Start with an idle prefill."""
        self._model = model
        self._free_at = float("-inf")

    def begin(self, arrival: float, prompt_tokens: int) -> float:
        """Return when the prompt is done, given that everything before it in the line has ended."""
        self._free_at = max(arrival, self._free_at) + self._model.prefill_s(prompt_tokens)
        return self._free_at

    def abort(self, now: float) -> None:
        """Free the prefill now: the prompt that ran was aborted."""
        self._free_at = min(self._free_at, now)
