"""Optimizer, precision and recomputation configs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import frexp
from typing import TYPE_CHECKING, Literal

from megatron_lite.config.flag import FIELD, Flag, option
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.given import Given
    from megatron_lite.config.run import RunConfig

OptimizerKind = Literal["adam", "sgd", "adafactor", "lion", "muon", "adamw8bit"]
WeightDecayStyle = Literal["constant", "linear", "cosine"]
Dtype = Literal["fp32", "bf16", "fp16"]


_USERS: dict[str, tuple[OptimizerKind, ...]] = {
    "adam": ("adam", "adamw8bit", "muon"),
    "sgd": ("sgd",),
    "lion": ("lion",),
    "adafactor": ("adafactor",),
    "muon": ("muon",),
}
"""Optimizers that read the fields with this prefix. Muon updates embeddings, norms and biases by AdamW."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Update rule and its constants."""

    kind: OptimizerKind = option(
        "adam",
        Flag(
            "--optimizer",
            "Update rule; adam is AdamW (decoupled weight decay), as in Megatron. See docs/optimizers.md.",
            choices={"adamw": "adam"},
        ),
    )
    adam_beta1: float = option(0.9, Flag("--adam-beta1", "Decay of the first moment.", below=1))
    adam_beta2: float = option(0.999, Flag("--adam-beta2", "Decay of the second moment.", below=1))
    adam_eps: float = option(1e-8, Flag("--adam-eps", "Added to the denominator.", above=0))
    sgd_momentum: float = option(0.9, Flag("--sgd-momentum", "Momentum of SGD.", most=1))
    lion_beta1: float = option(0.9, Flag("--lion-beta1", "Share of the momentum in Lion's update.", below=1))
    lion_beta2: float = option(0.99, Flag("--lion-beta2", "Decay of Lion's momentum.", below=1))
    adafactor_beta1: float | None = option(
        None, Flag("--adafactor-beta1", "Decay of Adafactor's first moment (default: there is none).", below=1)
    )
    adafactor_decay_rate: float = option(
        0.8, Flag("--adafactor-decay-rate", "Adafactor's second moment decays by 1 - t^-X at step t.", most=1)
    )
    adafactor_clip_threshold: float = option(
        1.0, Flag("--adafactor-clip-threshold", "Largest root mean square of Adafactor's update.", above=0)
    )
    adafactor_eps1: float = option(1e-30, Flag("--adafactor-eps1", "Added to squared gradients by Adafactor.", above=0))
    adafactor_eps2: float = option(
        1e-3, Flag("--adafactor-eps2", "Smallest root mean square of a parameter that scales its update.", above=0)
    )
    adafactor_scale_parameter: bool = option(
        True,
        Flag(
            "--no-adafactor-scale-parameter",
            "Adafactor's step does not grow with the root mean square of the parameter.",
            sets=False,
        ),
    )
    adafactor_relative_step: bool = option(
        False,
        Flag(
            "--adafactor-relative-step",
            "The learning rate is min(0.01, 1/sqrt(t)) at step t, instead of --lr and its schedule.",
            sets=True,
        ),
    )
    adafactor_warmup_init: bool = option(
        False, Flag("--adafactor-warmup-init", "Relative steps begin with 1e-6 t instead of 0.01.", sets=True)
    )
    muon_momentum: float = option(0.95, Flag("--muon-momentum", "Decay of Muon's momentum.", below=1))
    muon_nesterov: bool = option(
        True,
        Flag("--muon-use-nesterov", "Nesterov momentum.", aliases=("--muon-nesterov",), sets=True),
        Flag("--muon-no-nesterov", "Muon's update is the momentum alone.", sets=False),
    )
    muon_num_ns_steps: int = option(
        5, Flag("--muon-num-ns-steps", "Newton-Schulz iterations that orthogonalize an update.", least=1)
    )
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = option(
        "spectral",
        Flag(
            "--muon-scale-mode",
            "Factor of an update of r rows and c columns: sqrt(max(r, c)), sqrt(r/c) or sqrt(max(1, r/c)).",
        ),
    )
    muon_extra_scale_factor: float = option(
        0.2,
        Flag(
            "--muon-extra-scale-factor",
            "Further factor; 0.2 with spectral gives updates of AdamW's size (arXiv:2502.16982).",
            above=0,
        ),
    )
    muon_split_qkv: bool = option(
        True,
        Flag("--muon-no-split-qkv", "Orthogonalize the QKV weight as one matrix, not Q, K and V.", sets=False),
    )
    muon_tp_mode: Literal["duplicated", "blockwise"] = option(
        "duplicated",
        Flag(
            "--muon-tp-mode",
            "Orthogonalize complete matrices, gathered on every tensor-parallel rank, or each rank its block.",
        ),
    )
    ema_decay: float = option(
        0.0,
        Flag("--ema-decay", "Decay of a moving average of the weights, evaluated beside them (0: none).", below=1),
    )
    clip_grad: float = option(1.0, Flag("--clip-grad", "Largest global gradient norm (0: no clipping)."))
    weight_decay: float = option(0.01, Flag("--weight-decay", "Decay of the weights that are matrices."))
    start_weight_decay: float | None = option(
        None, Flag("--start-weight-decay", "Weight decay at the start of the run.")
    )
    end_weight_decay: float | None = option(None, Flag("--end-weight-decay", "Weight decay at the end of the run."))
    weight_decay_style: WeightDecayStyle = option(
        "constant", Flag("--weight-decay-incr-style", "Shape of the weight decay's rise from start to end.")
    )
    check_for_nan: bool = option(
        True,
        Flag(
            "--check-for-nan-in-loss-and-grad",
            "Stop at a loss or gradient that is not finite; fp16 skips the iteration instead.",
            sets=True,
        ),
        Flag(
            "--no-check-for-nan-in-loss-and-grad", "Continue after a loss or gradient that is not finite.", sets=False
        ),
    )

    @property
    def relative_step(self) -> str:
        """Return the formula of Adafactor's learning rate at step t; empty: it is that of --lr."""
        if not self.adafactor_relative_step:
            return ""
        return f"min({'1e-6 t' if self.adafactor_warmup_init else '0.01'}, 1/sqrt(t)) at step t"


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Type of the parameters in forward and backward. The optimizer's state and gradients are always fp32."""

    dtype: Dtype = option(
        "fp32",
        Flag("--fp16", "Half precision with loss scaling.", sets="fp16"),
        Flag("--bf16", "bfloat16.", sets="bf16"),
        Flag("--fp32", "Single precision.", sets="fp32"),
    )
    loss_scale: float = option(
        0.0,
        Flag("--loss-scale", "Constant loss scale for fp16 (0: dynamic)."),
        Flag("--dynamic-loss-scale", "The default for fp16.", sets=0.0, means="--loss-scale 0"),
    )
    initial_loss_scale: float = option(2.0**32, Flag("--initial-loss-scale", "First value of the dynamic loss scale."))
    min_loss_scale: float = option(
        1.0, Flag("--min-loss-scale", "Smallest dynamic loss scale.", aliases=("--min-scale",), above=0)
    )
    loss_scale_window: int = option(
        1000, Flag("--loss-scale-window", "Iterations without overflow after which the loss scale doubles.", least=1)
    )
    hysteresis: int = option(2, Flag("--hysteresis", "Overflows after which the loss scale is halved.", least=1))
    scaler: Literal["megatron", "deepspeed"] = option(
        "megatron",
        Flag(
            "--loss-scaler",
            "Rule of dynamic loss scaling: DeepSpeed's resets the hysteresis at other times (the default under "
            "--deepspeed).",
        ),
    )

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter."""
        return 4 if self.dtype == "fp32" else 2


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Activation recomputation (Korthikanti et al. 2022, arXiv:2205.05198)."""

    granularity: Literal["none", "full", "selective"] = option(
        "none",
        Flag("--recompute-granularity", "Activations to recompute in backward."),
        Flag(
            "--checkpoint-activations",
            "Full recomputation, layer by layer.",
            sets="full",
            means="--recompute-granularity full --recompute-method uniform",
        ),
        Flag(
            "--recompute-activations",
            "Recompute the core of attention only.",
            sets="selective",
            means="--recompute-granularity selective",
        ),
    )
    method: Literal["uniform", "block"] = option(
        "uniform",
        Flag("--recompute-method", "Layers that full recomputation applies to; see --recompute-num-layers."),
        Flag(
            "--activations-checkpoint-method",
            "Old name of --recompute-method; full recomputation.",
            also=((FIELD.recompute.granularity, "full"),),
            means="--recompute-granularity full --recompute-method …",
        ),
    )
    num_layers: int = option(
        1,
        Flag(
            "--recompute-num-layers",
            "Layers of one recomputed unit (uniform), or recomputed layers of a stage (block).",
            aliases=("--checkpoint-num-layers", "--activations-checkpoint-num-layers"),
            least=1,
        ),
    )


def note_idle_recompute_flags(given: Given) -> None:
    """Note flags of recomputation that have no effect without --recompute-granularity."""
    if given.run.recompute.granularity == "none":
        for origin in map(given.origin, (FIELD.recompute.num_layers, FIELD.recompute.method)):
            if origin:
                given.notes.append(
                    f"{origin} has no effect: nothing is recomputed without --recompute-granularity full"
                )


def warn_of_inexact_loss_scale(given: Given) -> None:
    """Warn of a constant loss scale that is not a power of 2: scaling by it rounds."""
    scale = given.run.precision.loss_scale
    if scale > 0 and frexp(scale)[0] != 0.5:
        given.warnings.append(
            f"{given.origin(FIELD.precision.loss_scale)} is a constant loss scale and no power of 2, so scaling "
            "rounds; without it the scale is dynamic"
        )


def refuse_idle_optimizer_flags(given: Given) -> None:
    """Refuse flags of other optimizers than the chosen one."""
    kind = given.run.optimizer.kind
    for (section, name), _, origin in given.items():
        users = _USERS.get(name.partition("_")[0], ()) if section == "optimizer" else ()
        if users and kind not in users:
            default = "" if given.has(FIELD.optimizer.kind) else ", the default"
            given.refuse(
                f"{origin} has no effect with --optimizer {kind}{default}",
                fix=f"Remove {origin.split()[0]}, or use --optimizer {' or '.join(users)}",
            )
    if given.run.optimizer.adafactor_warmup_init and not given.run.optimizer.adafactor_relative_step:
        given.refuse(
            "--adafactor-warmup-init has no effect without --adafactor-relative-step",
            fix="Add --adafactor-relative-step, or use --lr-warmup-iters instead of --adafactor-warmup-init",
        )


def note_muon_defaults(given: Given) -> None:
    """Say where Muon's defaults differ from Megatron's."""
    megatron = {
        "--muon-extra-scale-factor 1": FIELD.optimizer.muon_extra_scale_factor,
        "--muon-no-nesterov": FIELD.optimizer.muon_nesterov,
        "--muon-tp-mode blockwise": FIELD.optimizer.muon_tp_mode,
    }
    differing = [flag for flag, field in megatron.items() if not given.has(field)]
    if given.run.optimizer.kind == "muon" and differing:
        given.notes.append(f"--optimizer muon: Megatron's defaults differ, and are {', '.join(differing)}")


RESOLVERS = (refuse_idle_optimizer_flags, note_muon_defaults, note_idle_recompute_flags, warn_of_inexact_loss_scale)


def weight_decay_has_both_ends(config: RunConfig) -> Iterator[ConfigError]:
    """Require a start and an end of a weight decay that rises."""
    optimizer = config.optimizer
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    if optimizer.weight_decay_style == "constant":
        ends = (("--start-weight-decay", start), ("--end-weight-decay", end))
        if given := [flag for flag, value in ends if value is not None]:
            yield ConfigError(
                f"{' and '.join(given)} {'have' if len(given) > 1 else 'has'} no effect with --weight-decay-incr-style "
                "constant, the default",
                fix="Add --weight-decay-incr-style linear or cosine, or give --weight-decay instead",
            )
    elif start is None or end is None or end < start:
        missing = [
            flag for flag, value in (("--start-weight-decay", start), ("--end-weight-decay", end)) if value is None
        ]
        yield ConfigError(
            f"--weight-decay-incr-style {optimizer.weight_decay_style} raises the weight decay, but "
            + (
                f"its start {start:g} is above its end {end:g} (--start-weight-decay, --end-weight-decay)"
                if start is not None and end is not None
                else f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not given"
            ),
            fix="Give both, the start below the end, for example --start-weight-decay 0.01 --end-weight-decay 0.1",
        )


def loss_scale_starts_above_its_minimum(config: RunConfig) -> Iterator[ConfigError]:
    """Require a dynamic loss scale that starts at or above its minimum."""
    precision = config.precision
    if precision.min_loss_scale > precision.initial_loss_scale:
        yield ConfigError(
            f"The loss scale starts below its minimum (--initial-loss-scale {precision.initial_loss_scale:g}, "
            f"--min-loss-scale {precision.min_loss_scale:g})",
            fix=f"Use --initial-loss-scale {precision.min_loss_scale:g} or more, or a smaller --min-loss-scale",
        )


def recompute_fits(config: RunConfig) -> Iterator[ConfigError]:
    """Require a recomputed unit that is not larger than the model."""
    recompute, layers = config.recompute, config.model.num_layers
    if recompute.granularity == "full" and recompute.num_layers > layers:
        yield ConfigError(
            f"Cannot recompute {recompute.num_layers} layers of a model with {layers} (--recompute-num-layers "
            f"{recompute.num_layers}, --num-layers {layers})",
            fix=f"Use --recompute-num-layers 1 to {layers}",
        )


RULES = (
    weight_decay_has_both_ends,
    loss_scale_starts_above_its_minimum,
    recompute_fits,
)
