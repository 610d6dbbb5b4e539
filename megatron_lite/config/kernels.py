"""Kernel conditions: settings under which other packages' kernels cannot be used, and conflicts of kernel flags.

backend/kernels.py chooses the kernels of a run by the same conditions, and adds what only the device can show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from megatron_lite.config.flag import FIELD
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.given import Given
    from megatron_lite.config.run import RunConfig

Function = Literal["norm", "attention", "loss", "weight gradient"]
Obstacle = tuple[str, str]
"""Why a kernel cannot compute a function of a run, and the change of flags after which it can; empty: no change."""


def _half(config: RunConfig) -> Iterator[Obstacle]:
    if config.precision.dtype == "fp32":
        yield "it takes bf16 and fp16 only", "add --bf16"


def _norm_by_apex(config: RunConfig) -> Iterator[Obstacle]:
    if config.model.zero_centered_norm:
        yield "it has no zero-centered norms (--apply-layernorm-1p)", ""


def _norm_by_liger(config: RunConfig) -> Iterator[Obstacle]:
    model = config.model
    if model.normalization == "RMSNorm":
        return
    if model.zero_centered_norm:
        yield "its LayerNorm is not zero-centered (--apply-layernorm-1p)", ""
    yield from _same_dtype(config)


def _same_dtype(config: RunConfig) -> Iterator[Obstacle]:
    if config.model.fp32_residual:
        yield "it does not take fp32 residuals (--fp32-residual-connection)", ""


def _flash(config: RunConfig) -> Iterator[Obstacle]:
    if config.parallel.cp > 1:
        yield "the sequence is split over context-parallel ranks", ""
    channels = config.model.head_dim
    if channels % 8 or channels > 256:
        yield f"it takes heads of up to 256 channels, in multiples of 8, not {channels}", ""
    yield from _half(config)


def _flash3(config: RunConfig) -> Iterator[Obstacle]:
    model = config.model
    if model.position_embedding == "alibi":
        yield "it has no ALiBi", ""
    if model.attention_dropout:
        yield "it has no dropout", ""
    yield from _flash(config)


def _whole_vocabulary(config: RunConfig) -> Iterator[Obstacle]:
    if (tp := config.parallel.tp) > 1:
        yield f"the vocabulary is split over tensor-parallel ranks (--tensor-model-parallel-size {tp})", ""


def _loss_by_cce(config: RunConfig) -> Iterator[Obstacle]:
    if config.runtime.deterministic:
        yield "it adds in no fixed order (--deterministic-mode)", "remove --deterministic-mode"
    yield from _whole_vocabulary(config)
    yield from _half(config)


OBSTACLES: Mapping[Function, Mapping[str, Callable[[RunConfig], Iterator[Obstacle]]]] = {
    "norm": {"apex": _norm_by_apex, "liger": _norm_by_liger, "te": _same_dtype},
    "attention": {"te": _flash, "flash-attn 3": _flash3, "flash-attn": _flash},
    "loss": {"te": _whole_vocabulary, "liger": _whole_vocabulary, "cce": _loss_by_cce},
    "weight gradient": {"apex": _half, "PyTorch's addmm": _half},
}
"""Conditions of each kernel of a function, by its name."""


def obstacles(function: Function, kernel: str, config: RunConfig) -> list[Obstacle]:
    """Return all reasons why a kernel cannot compute a function of a run."""
    return list(OBSTACLES[function][kernel](config))


def named_kernels(config: RunConfig) -> dict[Function, tuple[str, str]]:
    """Return for each function the kernel of another package that its own flag names, and that flag's name."""
    runtime = config.runtime
    named: dict[Function, tuple[str, str]] = {}
    if runtime.norm_kernel not in ("auto", "torch"):
        named["norm"] = runtime.norm_kernel, "--norm-kernel"
    if runtime.loss_kernel != "native":
        named["loss"] = runtime.loss_kernel, "--cross-entropy-fusion-impl"
    return named


def named_kernels_can_serve(config: RunConfig) -> Iterator[ConfigError]:
    """Refuse a named kernel that cannot compute its function; the flags have no effect on other devices than GPUs."""
    if config.runtime.engine != "native" or config.runtime.device not in ("auto", "cuda"):
        return
    for function, (kernel, flag) in named_kernels(config).items():
        for reason, change in obstacles(function, kernel, config):
            yield ConfigError(
                f"{flag} {kernel} cannot compute the {function} of this run: {reason}",
                fix=f"Remove {flag}" + (f", or {change}" if change else "") + "; without the flag PyTorch computes it",
            )


RULES = (named_kernels_can_serve,)


def resolve_kernel_flags(given: Given) -> None:
    """Refuse Transformer Engine with and without itself; note which of two flags chooses the kernel of a function."""
    runtime = given.run.runtime
    implementation = given.origin(FIELD.runtime.transformer_impl)
    if runtime.transformer_impl == "local" and runtime.norm_kernel == "te":
        given.refuse_both(implementation, given.origin(FIELD.runtime.norm_kernel))
    if runtime.transformer_impl != "transformer_engine":
        return
    for function, field, value in (
        ("norms", FIELD.runtime.norm_kernel, runtime.norm_kernel),
        ("attention", FIELD.runtime.attention, runtime.attention),
    ):
        if value not in ("auto", "te"):
            given.notes.append(f"{given.origin(field)} chooses the kernel of {function}, not {implementation}")


RESOLVERS = (resolve_kernel_flags,)
