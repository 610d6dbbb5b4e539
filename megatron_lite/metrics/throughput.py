"""Model FLOPs of a token, the MFU that follows from them, and when the run will be done.

The count is that of Narayanan et al. 2021 (arXiv:2104.04473, eq. 3) without its fourth pass for recomputation, and of
PaLM's appendix B (Chowdhery et al. 2022, arXiv:2204.02311): matrix products only, a multiply-add is two FLOPs, backward
costs twice forward, attention is counted over the full s x s square although half of it is masked. Recomputed work does
not count: these are the model's FLOPs, not the hardware's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from megatron_lite.config.model import ModelConfig


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """FLOPs to train on one token of a sequence of `seq_length`: forward and backward.

    For a GPT-2 (heads x head_dim = h, ffn 4h, no query groups) this is 72 l h^2 (1 + s / 6h + V / 12lh), eq. 3 with
    three passes in place of four (its V term, V / 16lh, belongs to four). Grouped queries shrink the key and value
    products, a gated MLP has three of them, and the output layer has `padded_vocab_size` rows.
    """
    hidden, heads = model.hidden_size, model.num_attention_heads * model.head_dim
    keys_and_values = 2 * model.num_query_groups * model.head_dim
    attention = hidden * (heads + keys_and_values) + heads * hidden + 2 * seq_length * heads
    mlp = hidden * model.ffn_hidden_size * (3 if model.gated else 2)
    head = hidden * (model.padded_vocab_size or model.vocab_size)
    multiply_adds = model.num_layers * (attention + mlp) + head
    return 3 * 2 * multiply_adds


@dataclass(frozen=True)
class Rates:
    """How fast an iteration was."""

    tokens_per_second: float
    tflops_per_device: float
    mfu: float | None
    eta_seconds: float


class Throughput:
    """Turns seconds and tokens into rates.

    The time left is (tokens left) / (tokens per second lately), which holds through a batch ramp-up; iterations left
    times seconds would not. The first iteration of a start is forgotten by the second: it pays for compilation and
    allocation.

    Args:
        devices: devices that share the work, all of the world.
        peak_flops: FLOP/s of one device in the run's dtype, as its maker states it; None: no MFU.
        horizon: iterations that the ETA looks back on.
    """

    def __init__(self, model: ModelConfig, *, devices: int, peak_flops: float | None, horizon: int = 50) -> None:
        self._model = model
        self._devices = devices
        self._peak = peak_flops
        self._recent: deque[tuple[float, int]] = deque(maxlen=horizon)
        self._first = True

    def measure(self, *, seconds: float, tokens: int, seq_length: int, remaining_tokens: int) -> Rates:
        """Rates of an iteration that took `seconds` for `tokens`, with `remaining_tokens` after it."""
        if len(self._recent) == 1 and self._first:
            self._recent.clear()
            self._first = False
        self._recent.append((max(seconds, 1e-9), tokens))
        tokens_per_second = tokens / max(seconds, 1e-9)
        flops = flops_per_token(self._model, seq_length) * tokens_per_second / self._devices
        lately = sum(count for _, count in self._recent) / sum(time for time, _ in self._recent)
        return Rates(
            tokens_per_second=tokens_per_second,
            tflops_per_device=flops / 1e12,
            mfu=flops / self._peak if self._peak else None,
            eta_seconds=remaining_tokens / lately if lately > 0 else float("inf"),
        )
