"""Throughput of an iteration: tokens per second, model FLOP/s, MFU and remaining time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from megatron_lite.config.counts import flops_per_token
from megatron_lite.config.model import ModelConfig


@dataclass(frozen=True)
class Rates:
    """Speed of one iteration."""

    tokens_per_second: float
    tflops_per_device: float
    mfu: float | None
    eta_seconds: float


class Throughput:
    """Computes rates from seconds and tokens.

    The remaining time is (remaining tokens) / (recent tokens per second), which is valid during a batch-size ramp-up.
    The first iteration after a start is excluded from the recent ones: it includes compilation and allocation.

    Args:
        model: architecture, for FLOPs per token.
        devices: number of devices of the job.
        peak_flops: nominal peak FLOP/s of one device in the dtype of the run; None: no MFU.
        horizon: number of recent iterations used for the remaining time.
    """

    def __init__(self, model: ModelConfig, *, devices: int, peak_flops: float | None, horizon: int = 50) -> None:
        self._model = model
        self._devices = devices
        self._peak = peak_flops
        self._recent: deque[tuple[float, int]] = deque(maxlen=horizon)
        self._first = True

    def measure(self, *, seconds: float, tokens: int, seq_length: int, remaining_tokens: int) -> Rates:
        """Return the rates of an iteration of `tokens` in `seconds`, with `remaining_tokens` after it."""
        if len(self._recent) == 1 and self._first:
            self._recent.clear()
            self._first = False
        self._recent.append((max(seconds, 1e-9), tokens))
        tokens_per_second = tokens / max(seconds, 1e-9)
        flops = flops_per_token(self._model, seq_length) * tokens_per_second / self._devices
        recent = sum(count for _, count in self._recent) / sum(time for time, _ in self._recent)
        return Rates(
            tokens_per_second=tokens_per_second,
            tflops_per_device=flops / 1e12,
            mfu=flops / self._peak if self._peak else None,
            eta_seconds=remaining_tokens / recent if recent > 0 else float("inf"),
        )
