"""Optimizer, learning-rate, precision and recomputation configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WsdDecayStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
WeightDecayStyle = Literal["constant", "linear", "cosine"]
Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Update rule and its constants. Sizes of steps are in the run's own unit: see LrConfig."""

    kind: Literal["adam", "sgd"] = "adam"
    """adam is AdamW (decoupled weight decay), as Megatron's adam is."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    sgd_momentum: float = 0.9
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    weight_decay: float = 0.01
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None
    weight_decay_style: WeightDecayStyle = "constant"
    check_for_nan: bool = True
    """bf16 and fp32 stop at a loss or gradient that is not finite; fp16 skips the iteration instead."""


@dataclass(frozen=True, kw_only=True)
class LrConfig:
    """Learning rate by progress. *_iters go with train_iters, *_samples with train_samples; 0: derived or none."""

    lr: float = 0.0
    min_lr: float = 0.0
    style: DecayStyle = "linear"
    decay_iters: int = 0
    """Iterations (or decay_samples) until min_lr is reached; 0: the length of the run."""
    decay_samples: int = 0
    decay_tokens: int = 0
    warmup_iters: int = 0
    warmup_samples: int = 0
    warmup_fraction: float | None = None
    """Share of the decay length that is warm-up; excludes the two above."""
    warmup_init: float = 0.0
    wsd_style: WsdDecayStyle = "exponential"
    wsd_decay_iters: int = 0
    wsd_decay_samples: int = 0


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Type of the parameters in forward and backward. The optimizer's state and gradients are always fp32."""

    dtype: Dtype = "fp32"
    loss_scale: float = 0.0
    """fp16: a constant loss scale; 0: dynamic."""
    initial_loss_scale: float = 2.0**32
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000
    hysteresis: int = 2
    scaler: Literal["megatron", "deepspeed"] = "megatron"
    """Whose rule of dynamic scaling: they refill the hysteresis differently (DeepSpeed's under --deepspeed)."""


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Activation recomputation (Korthikanti et al. 2022, arXiv:2205.05198)."""

    granularity: Literal["none", "full", "selective"] = "none"
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1
    """uniform: layers of one recomputed unit; block: layers of a stage that are recomputed."""
