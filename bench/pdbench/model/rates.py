"""How long a step takes: a roofline with measured efficiencies, plus what does not shrink with the work.

Sources of the formulas: FLOPs of a transformer pass, 2 per weight and token, and 4 x heads x head_dim per layer and
token-pair of attention (Kaplan et al. 2020, appendix; Hoffmann et al. 2022, appendix F); decode bound by reading weights
and KV cache from memory (Pope et al. 2022, "Efficiently Scaling Transformer Inference"). The constants are a profile's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

from pdbench.model.profile import Profile, ProfileError


class Rates:
    """Times in seconds of one worker of `tp_size` GPUs of a profile. All functions are pure."""

    def __init__(self, profile: Profile, tp_size: int = 1) -> None:
        """Compute what does not change."""
        self.profile, self.tp_size = profile, tp_size
        model, engine, gpu = profile.model, profile.engine, profile.gpu
        # Each doubling of the tensor parallel size keeps `tp_efficiency` of what would be ideal.
        scale: float = tp_size * engine.tp_efficiency ** math.log2(tp_size)
        self._flops_per_s = gpu.tflops * 1e12 * engine.compute_efficiency * scale
        self._bytes_per_s = gpu.bandwidth_gb_per_s * 1e9 * engine.bandwidth_efficiency * scale
        self._pair_flops = 4 * model.heads * model.head_dim
        self._full, self._windowed = model.layers - model.windowed_layers, model.windowed_layers
        expert_share = 0.0
        if model.experts:
            # active = dense + routed x k/E, and all = dense + routed
            routed = (model.params - model.active_params) / (1 - model.experts_per_token / model.experts)
            expert_share = min(1.0, routed / model.params)
        self._dense_bytes = model.params * (1 - expert_share) * model.weight_bytes
        self._expert_bytes = model.params * expert_share * model.weight_bytes

    @cached_property
    def layer_kv_bytes(self) -> float:
        """Return the KV bytes of one token in one layer: 2 x KV heads x head dim (GQA), latent + rope (MLA), x element size."""
        model = self.profile.model
        elements = model.kv_lora_rank + model.rope_dim if model.kv_lora_rank else 2 * model.kv_heads * model.head_dim
        return elements * model.kv_bytes

    def kv_bytes(self, tokens: int) -> int:
        """Return the bytes of KV cache that a prompt of `tokens` needs at the other side; windowed layers keep their window."""
        window = min(tokens, self.profile.model.window)
        return int(self.layer_kv_bytes * (self._full * tokens + self._windowed * window))

    def weights_read(self, tokens: int) -> float:
        """Return the bytes of weights that a pass of `tokens` tokens reads.

        With E experts, k of them for a token, and tokens that choose independently, a pass touches a share
        1 - (1 - k/E)^tokens of the experts.
        """
        if not self._expert_bytes:
            return self._dense_bytes
        model = self.profile.model
        untouched: float = (1 - model.experts_per_token / model.experts) ** tokens
        return self._dense_bytes + self._expert_bytes * (1 - untouched)

    def prefill_s(self, chunks: Iterable[tuple[int, int]]) -> float:
        """Return the seconds of a prefill pass over `chunks` of (new tokens, tokens already in the cache).

        overhead + max(compute, memory); compute = (2 x active weights x n + 4 x heads x head_dim x pairs) / FLOP rate, with
        pairs = n x (cached + n/2) per full layer, n x min(window, cached + n/2) per windowed one.
        """
        tokens, pairs, cached = 0, 0.0, 0
        for new, before in chunks:
            tokens += new
            cached += before
            reach = before + new / 2
            pairs += new * (self._full * reach + self._windowed * min(self.profile.model.window, reach))
        compute = (2 * self.profile.model.active_params * tokens + self._pair_flops * pairs) / self._flops_per_s
        memory = (self.weights_read(tokens) + cached * self._full * self.layer_kv_bytes) / self._bytes_per_s
        return self.profile.engine.prefill_overhead_ms / 1e3 + max(compute, memory)

    def decode_s(self, batch: int, context_tokens: int) -> float:
        """Return the seconds of one decode step of `batch` requests that have `context_tokens` in the cache together.

        overhead + batch x cost per request + max(compute, memory); memory = (weights read + KV read) / bandwidth.
        """
        model, engine = self.profile.model, self.profile.engine
        windowed = min(context_tokens, batch * model.window)
        kv = self.layer_kv_bytes * (self._full * context_tokens + self._windowed * windowed)
        pairs = self._full * context_tokens + self._windowed * windowed
        compute = (2 * model.active_params * batch + self._pair_flops * pairs) / self._flops_per_s
        memory = (self.weights_read(batch) + kv) / self._bytes_per_s
        return engine.decode_overhead_ms / 1e3 + batch * engine.decode_us_per_request / 1e6 + max(compute, memory)

    def capacity_tokens(self, mem_fraction: float | None = None) -> int:
        """Return how many tokens of KV cache fit: (memory x fraction - weights) / bytes a token, over all GPUs.

        With fewer KV heads than GPUs, heads are held more than once; MLA's latent is held by every GPU. Raises ProfileError
        when not even 1,000 tokens fit.
        """
        model, gpu = self.profile.model, self.profile.gpu
        fraction = self.profile.engine.mem_fraction if mem_fraction is None else mem_fraction
        room = gpu.memory_gb * 1e9 * fraction * self.tp_size - model.params * model.weight_bytes
        copies = self.tp_size if model.kv_lora_rank else max(1.0, self.tp_size / model.kv_heads)
        tokens = int(room / (self.layer_kv_bytes * model.layers * copies))
        if tokens < 1000:
            need = model.params * model.weight_bytes / 1e9
            raise ProfileError(
                f"no memory for KV cache: the weights are {need:.0f} GB, and there are {fraction:g} of {self.tp_size} x "
                f"{gpu.memory_gb:g} GB; use more GPUs (tensor_parallel_size) or a larger mem_fraction"
            )
        return tokens

    def transfer_s(self, size_bytes: int, transport: str) -> float:
        """Return the seconds that a KV transfer keeps a link busy: bytes / bandwidth. Latency comes on top."""
        return size_bytes / (self.profile.transports[transport].bandwidth_gb_per_s * 1e9)
