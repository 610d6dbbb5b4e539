"""Raw checkpoint dataclass: args, tensors and state as the Megatron-LM and DeepSpeed readers return them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lite.interop.megatron.arrangements import CURRENT_VERSION
from megatron_lite.interop.megatron.naming import Scheme
from megatron_lite.interop.megatron.shards import Part

Parts = Mapping[str, Sequence[Part]]
"""Parts of tensors, one for each tensor-parallel rank, by their name with layers numbered over the whole model."""


@dataclass(frozen=True, eq=False)
class AdamState:
    """State of a mixed-precision Adam, as far as a run needs it to go on.

    Attributes:
        tensors: main_param, exp_avg and exp_avg_sq (the first is empty in fp32), each by their names.
        step: Adam's count of steps.
        loss_scaler: a loss scaler's state as LossScaler.state gives it, with its `kind`.
    """

    tensors: Mapping[str, Parts]
    step: int
    loss_scaler: Mapping[str, Any] = field(default_factory=lambda: {"kind": "constant"})


@dataclass(frozen=True, eq=False)
class Found:
    """A checkpoint's content.

    Attributes:
        folder: its folder.
        where: the file that holds the args, or would.
        scheme: the naming scheme of `parts`.
        parts: the weights.
        num_layers: layers that were found.
        arguments: the args; None: there are none.
        version: checkpoint version, which decides the order of QKV rows.
        iteration: of the run that saved it.
        vocab_size: true size of the vocabulary, where the files say it.
        head_copy: the last stage's table of the head, which is the embedding's copy if the model is tied.
        adam: the optimizer's state, if it was asked for and is there.
        scheduler: state of the learning-rate scheduler.
        content: the rest of the first file: iteration and whatever else it says.
        raw: every tensor of every file.
        notes: what the user should know.
    """

    folder: Path
    where: str
    scheme: Scheme
    parts: Parts
    num_layers: int
    arguments: Mapping[str, Any] | None
    iteration: int
    raw: Mapping[str, Part]
    version: float = CURRENT_VERSION
    vocab_size: int | None = None
    head_copy: Sequence[Part] | None = None
    adam: AdamState | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
