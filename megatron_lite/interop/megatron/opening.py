"""Opening of a Megatron-LM or DeepSpeed checkpoint for import: detects the format and runs its reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron_lite.interop.foreign import ForeignModel
from megatron_lite.interop.megatron.assemble import Choices, assemble
from megatron_lite.interop.megatron.classic import read_classic
from megatron_lite.interop.megatron.deepspeed import read_deepspeed
from megatron_lite.interop.megatron.flags import read_model_flags
from megatron_lite.interop.megatron.found import Found
from megatron_lite.interop.megatron.torch_dist import read_torch_dist
from megatron_lite.interop.megatron.universal import read_universal
from megatron_lite.runs.foreign import Kind, Recognised


@dataclass(frozen=True, kw_only=True)
class MegatronOptions:
    """Options of an import from Megatron-LM or DeepSpeed.

    Attributes:
        weights_only: leave the optimizer's state out; the run starts anew.
        replicated: how differing copies of a replicated tensor are settled; empty: they are an error.
        checkpoint_version: of a file that does not say it; None: it does, or is of version 0.
        flags: the model's and tokenizer's flags, in Megatron's spelling.
        padded: take all rows of the vocabulary where its true size is not known (to compare, not to import).
        dtype: what weights are converted to; None: as they are.
        seq_length: the longest sequence that is wanted; 0: all of the model's positions.
        ignored_keys: unknown args and DeepSpeed config keys that may be ignored.
    """

    weights_only: bool = False
    replicated: Literal["", "average", "first"] = ""
    checkpoint_version: float | None = None
    flags: Sequence[str] = ()
    padded: bool = False
    dtype: torch.dtype | None = None
    seq_length: int = 0
    ignored_keys: Sequence[str] = ()


def open_megatron(source: Recognised, options: MegatronOptions) -> ForeignModel:
    """Read everything of a checkpoint but its tensors' values.

    Raises:
        CheckpointError: it is damaged or incomplete, contradicts the flags, or has settings that are not supported.
        ConfigError: a flag is wrong.
    """
    stated = read_model_flags(options.flags)
    stated = replace(
        stated, seq_length=options.seq_length or stated.seq_length, checkpoint_version=options.checkpoint_version
    )
    found = read_found(source, options)
    return assemble(found, stated, Choices(options.replicated, options.dtype, options.padded, options.ignored_keys))


def read_found(source: Recognised, options: MegatronOptions) -> Found:
    """Return what a format's reader finds in a folder.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    readers = {
        Kind.MEGATRON: read_classic,
        Kind.MEGATRON_DIST: read_torch_dist,
        Kind.DEEPSPEED: read_deepspeed,
        Kind.DEEPSPEED_UNIVERSAL: read_universal,
    }
    return readers[source.kind](
        source.folder, version=options.checkpoint_version, with_optimizer=not options.weights_only
    )
