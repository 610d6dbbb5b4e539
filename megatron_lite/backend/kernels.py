"""Vendor kernels: choice of the installed kernels of apex, Transformer Engine, flash-attn, Liger and CCE for a run.

Each function (norm, attention, loss, weight gradient) has a row of candidates in CANDIDATES. One serves a run if
a flag asks for it or PyTorch has no fused kernel of its own, if the run meets its conditions, if it is installed, and
if it computed the same values and gradients as PyTorch when it was tried on small inputs on the run's device. Otherwise
PyTorch computes the function, and the start-up lines give the reason. None of these packages is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from megatron_lite.backend import kernel_trials as trials
from megatron_lite.backend import vendors
from megatron_lite.backend.comparison import Comparison
from megatron_lite.backend.libraries import is_installed
from megatron_lite.backend.vendors import AttentionKernel, LossKernel, NormKernel, WeightGradientKernel, torch_norm
from megatron_lite.config.kernels import Function, obstacles
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError, install_extra

KERNELS = Comparison(
    topic="kernels",
    problem="Ranks would compute a function by different kernels, whose results differ in the last digits",
    fix="Install the same packages on every node, or give --transformer-impl local --norm-kernel torch "
    "--attention-backend fused --no-gradient-accumulation-fusion, which need none",
)


@dataclass(frozen=True)
class Kernels:
    """Kernels of a run's functions.

    Attributes:
        norm: LayerNorm and RMSNorm.
        attention: causal attention within samples or documents; None: the backend's.
        loss: cross-entropy; None: parallel/cross_entropy.py's own.
        weight_gradient: adds products of half-precision operands to fp32 gradients; None: none can.
        report: for each function its kernel and why no other, for the start-up lines.
    """

    norm: NormKernel = torch_norm
    attention: AttentionKernel | None = None
    loss: LossKernel | None = None
    weight_gradient: WeightGradientKernel | None = None
    report: tuple[str, ...] = ()

    @property
    def names(self) -> dict[str, str]:
        """Return the kernel of each reported function, with its version."""
        pairs = (text.partition(": ") for text in self.report)
        return {function: kernel.partition(" (")[0] for function, _, kernel in pairs}


@dataclass(frozen=True)
class Candidate:
    """A kernel that can compute a function.

    Attributes:
        name: as flags and start-up lines write it.
        modules: top-level modules that are there if it is installed. NVIDIA's apex is found by its extensions: the
            package named apex in PyPI's index is another project.
        adapt: imports the kernel, and returns it in the form of the function (backend/vendors.py).
        install: instruction to install it.
    """

    name: str
    modules: tuple[str, ...]
    adapt: Callable[[RunConfig], Any]
    install: str

    @property
    def installed(self) -> bool:
        """Return whether its modules can be found, without importing them."""
        return all(is_installed(module) for module in self.modules)


class Wish(NamedTuple):
    """What a run's flags ask of one function.

    Attributes:
        names: candidates, the best first; empty: PyTorch's kernel.
        why: reason for these candidates, or for none.
        flag: that asks for the first candidate: it must be installed. Empty: it may be missing.
        strict: the candidate must serve, whatever the obstacle.
    """

    names: tuple[str, ...]
    why: str = ""
    flag: str = ""
    strict: bool = False


_APEX = "Install it with `APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex`"
_TE = "Install it with `pip install --no-build-isolation 'transformer_engine[pytorch]'`"
_FLASH = "Install it with `pip install --no-build-isolation flash-attn`"
_LIGER = _CCE = install_extra("kernels")

CANDIDATES: dict[Function, tuple[Candidate, ...]] = {
    "norm": (
        Candidate("apex", ("fused_layer_norm_cuda", "apex"), vendors.apex_norm, _APEX),
        Candidate("liger", ("liger_kernel",), vendors.liger_norm, _LIGER),
        Candidate("te", ("transformer_engine",), vendors.te_norm, _TE),
    ),
    "attention": (
        Candidate("te", ("transformer_engine",), vendors.te_attention, _TE),
        Candidate("flash-attn 3", ("flash_attn_interface",), vendors.flash3_attention, _FLASH),
        Candidate("flash-attn", ("flash_attn",), vendors.flash_attention, _FLASH),
    ),
    "loss": (
        Candidate("te", ("transformer_engine",), vendors.te_loss, _TE),
        Candidate("liger", ("liger_kernel",), vendors.liger_loss, _LIGER),
        Candidate("cce", ("cut_cross_entropy",), vendors.cce_loss, _CCE),
    ),
    "weight gradient": (
        Candidate("apex", ("fused_weight_gradient_mlp_cuda",), vendors.apex_weight_gradient, _APEX),
        Candidate("PyTorch's addmm", (), vendors.torch_weight_gradient, ""),
    ),
}
TRIALS: dict[Function, Callable[[Any, RunConfig, torch.device], float]] = {
    "norm": trials.try_norm,
    "attention": trials.try_attention,
    "loss": trials.try_loss,
    "weight gradient": trials.try_weight_gradient,
}
TORCH: dict[Function, str] = {
    "norm": "PyTorch",
    "attention": "PyTorch",
    "loss": "native",
    "weight gradient": "added after the product",
}


def _wish_norm(config: RunConfig) -> Wish:
    runtime, model = config.runtime, config.model
    if runtime.norm_kernel == "torch":
        return Wish((), "--norm-kernel torch")
    if runtime.norm_kernel != "auto":
        return Wish((runtime.norm_kernel,), flag=f"--norm-kernel {runtime.norm_kernel}", strict=True)
    if runtime.transformer_impl == "transformer_engine":
        return Wish(("te",), flag="--transformer-impl transformer_engine")
    if runtime.compile != "off":
        return Wish((), "--compile fuses it")
    if not (model.zero_centered_norm or model.fp32_residual):
        return Wish((), "one fused kernel already")
    return Wish(("apex", "liger", *_te(config)))


def _wish_attention(config: RunConfig) -> Wish:
    runtime, model = config.runtime, config.model
    if runtime.attention in ("fused", "unfused"):
        return Wish((), f"--attention-backend {runtime.attention}")
    if runtime.attention == "flash":
        return Wish(("flash-attn 3", "flash-attn"))
    if runtime.transformer_impl == "transformer_engine":
        return Wish(("te",), flag="--transformer-impl transformer_engine")
    # PyTorch's varlen kernel, of version 2.10 and newer, has no dropout, and ROCm has none.
    varlen = not torch.version.hip and find_spec("torch.nn.attention.varlen") is not None
    by_document = config.data.reset_attention_mask and (model.attention_dropout or not varlen)
    if model.position_embedding == "alibi" or by_document:
        return Wish(("flash-attn", *_te(config)))
    return Wish((), "it has fused kernels for this mask")


def _wish_loss(config: RunConfig) -> Wish:
    name = config.runtime.loss_kernel
    if name == "native":
        return Wish((), "projection and loss together, in chunks")
    return Wish((name,), flag=f"--cross-entropy-fusion-impl {name}", strict=True)


def _wish_weight_gradient(config: RunConfig) -> Wish:
    if not config.runtime.gradient_accumulation_fusion:
        return Wish((), "--no-gradient-accumulation-fusion")
    return Wish(("apex", "PyTorch's addmm"))


def _te(config: RunConfig) -> tuple[str, ...]:
    return () if config.runtime.transformer_impl == "local" else ("te",)


WISHES: dict[Function, Callable[[RunConfig], Wish]] = {
    "norm": _wish_norm,
    "attention": _wish_attention,
    "loss": _wish_loss,
    "weight gradient": _wish_weight_gradient,
}


def choose_kernels(config: RunConfig, device: torch.device, *, gpu: bool) -> Kernels:
    """Return the kernels of a run.

    Args:
        config: the run.
        device: on which candidates are tried.
        gpu: whether the device is a GPU, which all vendors' kernels need; False: PyTorch's are used.

    Raises:
        ConfigError: a flag asks for a kernel that is not installed, or cannot serve this run.
    """
    chosen: dict[Function, Any] = {}
    report = []
    for function, wish_of in WISHES.items():
        wish = wish_of(config)
        if not gpu:
            flag = wish.flag
            if function == "attention" and config.runtime.attention != "auto":
                flag = f"--attention-backend {config.runtime.attention}"
            if flag:
                report.append(f"{function}: {TORCH[function]} ({flag} needs --device cuda)")
            continue
        chosen[function], text = _choose(function, wish, config, device)
        report.append(f"{function}: {text}")
    return Kernels(
        norm=chosen.get("norm") or torch_norm,
        attention=chosen.get("attention"),
        loss=chosen.get("loss"),
        weight_gradient=chosen.get("weight gradient"),
        report=tuple(report),
    )


def _choose(function: Function, wish: Wish, config: RunConfig, device: torch.device) -> tuple[Any, str]:
    """Return the kernel of one function (None: PyTorch's), and its text of the report."""
    reasons = [wish.why] if wish.why else []
    for candidate in (next(row for row in CANDIDATES[function] if row.name == name) for name in wish.names):
        kernel, reason = prepare(function, candidate, config, device)
        if not reason:
            return kernel, _describe(candidate, reasons)
        if wish.strict or (wish.flag and not candidate.installed):
            raise _refused(function, candidate, wish, reason)
        reasons.append(f"{candidate.name}: {reason}")
    return None, TORCH[function] + (f" ({'; '.join(reasons)})" if reasons else "")


def prepare(function: Function, candidate: Candidate, config: RunConfig, device: torch.device) -> tuple[Any, str]:
    """Return a candidate's kernel, or None and the reason why it cannot serve the run."""
    if not candidate.installed:
        return None, "not installed"
    if found := obstacles(function, candidate.name, config):
        return None, found[0][0]
    try:
        kernel = candidate.adapt(config)
        deviation = TRIALS[function](kernel, config, device)
    except Exception as error:  # an extension that was built for another torch or GPU may raise anything
        lines = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__} when it was tried{': ' if lines[0] else ''}{lines[0][:120]}"
    if not deviation <= trials.tolerance(function, config):
        return None, f"its results deviate from PyTorch's by {deviation:.1g} of the largest element"
    return kernel, ""


def _describe(candidate: Candidate, reasons: list[str]) -> str:
    text = candidate.name
    for module in candidate.modules[-1:]:
        version = getattr(sys.modules.get(module), "__version__", "")
        text += f" {version}" if version else ""
    return text + (f" ({'; '.join(reasons)})" if reasons else "")


def _refused(function: Function, candidate: Candidate, wish: Wish, reason: str) -> ConfigError:
    flag = wish.flag.split()[0]
    if not candidate.installed:
        return ConfigError(
            f"{wish.flag} needs {' and '.join(candidate.modules)}, and this Python finds no such module",
            fix=f"{candidate.install}, or remove {flag}",
        )
    return ConfigError(
        f"{wish.flag} cannot compute the {function} of this run: {reason}",
        fix=f"Remove {flag}; PyTorch then computes it",
    )
