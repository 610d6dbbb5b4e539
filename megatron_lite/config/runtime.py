"""Runtime config: device, seed, threads, determinism, compilation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_lite.config.flag import FIELD, Flag, Format, option
from megatron_lite.config.values import MAX_SEED

if TYPE_CHECKING:
    from megatron_lite.config.given import Given


Compile = Literal["off", "auto", "layer", "stage"]
"""What torch.compile compiles; auto: --compile without a value, resolved to layer or stage."""

DEVICE_SPELLINGS = {"gpu": "cuda", "rocm": "cuda", "tpu": "xla"}
"""Further spellings of --device."""

LOSS_CHUNK = 4096
"""Tokens whose logits a GPU computes at once for the loss."""
LOSS_BLOCKS = 9
"""Parts of a chunk that eager kernels work on one after the other: they need temporary tensors of a part's size in
fp32. At 9 parts these are less than a quarter of a chunk's logits in bf16."""
GRADIENT_ROWS = 16384
"""Output channels of a temporary weight gradient: all of a layer's, a part of the vocabulary's."""
MAX_SCORES = 1 << 27
"""Scores of queries and keys that separate products compute at once: 512 MB in fp32."""
QUANTIZATION_BLOCK = 256
"""Elements of an 8-bit moment with a common scale: the largest of their absolute values."""


def read_compile(args: Sequence[str]) -> Compile:
    """Read the value of --compile, which may be missing."""
    if not args:
        return "auto"
    for kind in ("off", "layer", "stage"):
        if [kind] == [arg.lower() for arg in args]:
            return kind
    raise ValueError("layer, stage, off, or no value")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Settings of the machine, which change neither the model nor its data."""

    device: Literal["auto", "cpu", "cuda", "xpu", "mps", "xla"] = option(
        "auto",
        Flag(
            "--device",
            "Kind of device: cuda for NVIDIA and AMD, xpu for Intel, mps for a Mac, xla for TPUs (docs/tpu.md); auto "
            "uses cuda or xpu if there is a GPU. `megatron-lite devices` lists those of this host.",
            choices=DEVICE_SPELLINGS,
        ),
        may_differ="the device in use is compared instead: auto and cuda may mean the same",
    )
    engine: Literal["native", "deepspeed", "xla"] = option(
        "native",
        Flag(
            "--engine",
            "Engine that trains: the project's own, DeepSpeed (the default under --deepspeed with ZeRO stage 2 or 3 "
            "or offloading; docs/deepspeed.md), or that of --device xla.",
        ),
    )
    seed: int = option(1234, Flag("--seed", "Seed of weights, dropout and data order.", most=MAX_SEED))
    compile: Compile = option(
        "off",
        Flag(
            "--compile",
            "torch.compile the layers one by one (layer: one graph for all, gradients reduced during backward), or "
            "each pipeline stage as one graph (stage). Without a value: stage on one device, layer on several.",
            format=Format(
                metavar="[layer|stage|off]", example="layer", read=read_compile, write=lambda kind: [kind], count="any"
            ),
        ),
    )
    manual_gc_interval: int = option(
        100,
        Flag(
            "--manual-gc-interval",
            "Iterations from one collection of Python's garbage to the next, at the same time on all ranks (0: "
            "whenever Python chooses).",
        ),
    )
    attention: Literal["auto", "flash", "fused", "unfused"] = option(
        "auto",
        Flag(
            "--attention-backend",
            "Attention kernel on a GPU: PyTorch's choice, FlashAttention, cuDNN's (fused), or separate products.",
            choices={"local": "unfused"},
        ),
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = option(
        "auto",
        Flag(
            "--transformer-impl",
            "Norms and attention by Transformer Engine on a GPU, or without it (local); auto: by what is installed, "
            "where PyTorch has no fused kernel.",
        ),
    )
    norm_kernel: Literal["auto", "torch", "apex", "liger", "te"] = option(
        "auto",
        Flag(
            "--norm-kernel",
            "LayerNorm and RMSNorm on a GPU by PyTorch, NVIDIA's apex, Liger Kernel or Transformer Engine; auto: "
            "PyTorch, but for zero-centered norms and fp32 residuals, which it computes in several kernels.",
        ),
        Flag("--no-persist-layer-norm", "Norms by PyTorch.", sets="torch"),
    )
    loss_kernel: Literal["native", "te", "liger", "cce"] = option(
        "native",
        Flag(
            "--cross-entropy-fusion-impl",
            "Cross-entropy in chunks with the projection (native), or on a GPU by Transformer Engine, Liger Kernel or "
            "cut cross-entropy (cce), without tensor parallelism.",
            choices={"linear": "native"},
        ),
    )
    tf32: bool = option(
        False,
        Flag(
            "--allow-tf32",
            "Compute fp32 matrix products in TF32 on a GPU: faster, with 10 bits of mantissa.",
            sets=True,
        ),
    )
    gradient_accumulation_fusion: bool = option(
        True,
        Flag(
            "--no-gradient-accumulation-fusion",
            "Compute weight gradients in half precision, then add them to the fp32 buffers; without it a GPU adds them "
            "in fp32 while they are computed.",
            sets=False,
        ),
    )
    deterministic: bool = option(
        False, Flag("--deterministic-mode", "Refuse kernels that are not bit-for-bit reproducible.", sets=True)
    )
    num_threads: int = option(
        0,
        Flag(
            "--num-threads",
            "CPU threads of a rank (0: an equal share of the machine's cores); on a GPU PyTorch's own number.",
            most=4096,
        ),
        may_differ="nodes may have different numbers of cores",
    )
    xla_cache: str = option(
        "",
        Flag(
            "--xla-cache-path",
            "Folder in which compiled graphs of --device xla are kept for later jobs (default: "
            "~/.cache/megatron_lite/xla; off: none).",
            metavar="FOLDER",
        ),
        may_differ="each host has a cache of its own",
    )
    check_nodes: bool = option(
        False,
        Flag(
            "--check-nodes",
            "Before training, check the nodes as `megatron-lite doctor --fast` does; bad ones are excluded and end the "
            "job.",
            sets=True,
        ),
    )
    dry_run: bool = option(False, Flag("--dry-run", "Check and explain the command, then exit.", sets=True))


def resolve_compile(given: Given) -> None:
    """Choose what --compile without a value compiles."""
    if given.run.runtime.compile == "auto":
        kind: Compile = "stage" if given.run.parallel.world_size == 1 else "layer"
        given.give(FIELD.runtime.compile, kind, given.origin(FIELD.runtime.compile))


RESOLVERS = (resolve_compile,)
