"""Conversion of a Megatron-LM or DeepSpeed checkpoint's content: model config, renamed tensors and training state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_lite.checkpoint.names import MAIN_PREFIX
from megatron_lite.checkpoint.sources import TensorInfo, TensorSource
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parameters import HEAD, WORD_EMBEDDINGS, ParameterLayout, parameter_layouts
from megatron_lite.errors import CheckpointError
from megatron_lite.interop.foreign import ForeignModel
from megatron_lite.interop.mapping import Entry, ImportedTensors
from megatron_lite.interop.megatron.adam import MAIN, WEIGHTS_ONLY
from megatron_lite.interop.megatron.arguments import Evidence, model_config, read_arguments
from megatron_lite.interop.megatron.arrangements import arrangement_of
from megatron_lite.interop.megatron.flags import Stated
from megatron_lite.interop.megatron.found import Found, Parts
from megatron_lite.interop.megatron.judgement import DEEPSPEED_CONFIGS, judge_deepspeed_config
from megatron_lite.interop.megatron.progress import run_scalars
from megatron_lite.interop.megatron.shards import (
    Combined,
    Joined,
    JoinedTensors,
    Part,
    RawTensors,
    Renamed,
    describe_copies,
    differing_copies,
)
from megatron_lite.interop.transforms import Rows, Same
from megatron_lite.rectangle import Rectangle
from megatron_lite.tokenizer.build import build_tokenizer

_LONGEST = 4096
_CLOSE = 2.0**-7
"""Largest relative distance of a main parameter and its bf16 rounding, with a margin; two other weights lie further."""


@dataclass(frozen=True)
class Choices:
    """Choices of the command line for an import.

    Attributes:
        replicated: how differing copies of a replicated tensor are settled; empty: they are an error.
        dtype: what weights are converted to; None: as they are.
        padded: take all rows of the vocabulary where its true size is not known (to compare, not to import).
        ignored_keys: unknown args and DeepSpeed config keys that may be ignored.
    """

    replicated: Literal["", "average", "first"] = ""
    dtype: torch.dtype | None = None
    padded: bool = False
    ignored_keys: Sequence[str] = ()


def assemble(found: Found, stated: Stated, choices: Choices) -> ForeignModel:
    """Return the model, tensors and run state of a checkpoint.

    Args:
        found: what its reader found.
        stated: what the command line says of the model.
        choices: how it is to be imported.

    Raises:
        CheckpointError: files, args and flags contradict each other or leave something open, a setting is not
            supported, or tensors are missing, left over or of wrong shapes.
    """
    notes = list(found.notes)
    evidence = Evidence(found.arguments, found.where, stated)
    read_arguments(evidence, choices.ignored_keys)
    for config in (found.content.get("ds_config"), *map(evidence.arguments.get, DEEPSPEED_CONFIGS)):
        judge_deepspeed_config(config, found.where, choices.ignored_keys)
    parts = _with_head(found, evidence)
    _note_tensors(found, parts, evidence)
    _note_vocabulary(found, parts, evidence, stated, choices)
    model = model_config(evidence, notes)
    layouts = parameter_layouts(model)
    table = found.scheme.table(layouts, model.num_layers)
    gate_first = not evidence.arguments.get("glu_activation")
    joiner = _Joiner(found, model, layouts, gate_first, choices.replicated == "average")
    joined = {theirs: joiner.join(ours, parts[theirs]) for ours, theirs in table.items() if theirs in parts}
    left = {theirs: Joined(part, None) for theirs, part in parts.items() if theirs not in joined}
    _settle_copies(joined, choices, notes, "weights", found.folder)
    weights = _imported(JoinedTensors({**joined, **left}), table, layouts, model, found, choices.dtype)
    dtype = choices.dtype or getattr(torch, weights.tensors[WORD_EMBEDDINGS].dtype)
    sources: list[TensorSource] = [weights]
    scalars: dict[str, Any] = {}
    if found.adam is not None:
        exact = not choices.replicated
        sources += _adam_tensors(found.adam.tensors, weights, table, layouts, model, joiner, choices, notes, exact)
        scalars = run_scalars(found, stated, evidence, notes)
    raw = RawTensors(found.raw)
    length = stated.seq_length or min(model.max_position_embeddings or _LONGEST, _LONGEST)
    return ForeignModel(
        replace(model, max_position_embeddings=model.max_position_embeddings or length),
        Combined(sources),
        raw,
        stated.tokenizer,
        dtype,
        length,
        tuple(notes),
        found.iteration if scalars else 0,
        scalars,
    )


def _with_head(found: Found, evidence: Evidence) -> Parts:
    """Return the weights with the head's table if it is untied; a tied copy must be equal to the embedding's table.

    The last stage of a pipeline has a table of the head in either case, so its presence does not mean that it is
    untied.
    """
    copy = found.head_copy
    head = found.scheme.theirs(HEAD, found.num_layers) if "output_layer" in found.scheme.outside else ""
    if copy is None:
        evidence.add("tied_embeddings", head not in found.parts, f"the tensors of {found.folder}")
        return found.parts
    embedding = found.parts.get(found.scheme.theirs(WORD_EMBEDDINGS, found.num_layers), ())
    equal = len(embedding) == len(copy) and all(
        one.shape == other.shape and one.load().equal(other.load()) for one, other in zip(embedding, copy, strict=True)
    )
    if not evidence.has("tied_embeddings"):
        evidence.add("tied_embeddings", equal, f"the tensors of {found.folder}")
    if not evidence.get("tied_embeddings"):
        return {**found.parts, head: copy}
    if not equal:
        raise CheckpointError(
            f"The model has tied embeddings, but the output layer in {copy[0].where} differs from the embedding in "
            f"{embedding[0].where if embedding else found.folder}",
            fix="Add --untie-embeddings-and-output-weights if the model has an output layer of its own; otherwise "
            "copy the folder "
            "again, whose files are of different checkpoints",
        )
    return found.parts


def _note_tensors(found: Found, parts: Parts, evidence: Evidence) -> None:
    """Note what the tensors' presence and shapes say of the model."""
    origin = f"the tensors of {found.folder}"
    scheme, layers = found.scheme, found.num_layers
    evidence.add("num_layers", layers, origin)

    def shape(ours: str) -> tuple[int, ...] | None:
        theirs = scheme.theirs(ours, layers)
        return parts[theirs][0].shape if theirs in parts else None

    words = shape(WORD_EMBEDDINGS)
    if words is not None and len(words) > 1:
        evidence.add("hidden_size", words[1], origin)
    if "embedding.position_embeddings" in scheme.outside:
        positions = shape("embedding.position_embeddings.weight")
        if positions is not None:
            evidence.add("position_embedding", "learned", origin)
            evidence.add("max_position_embeddings", positions[0], origin)
        elif evidence.get("position_embedding") == "learned":
            evidence.add("position_embedding", "one without a table", origin)
    if "embedding.norm" in scheme.outside:
        evidence.add("embed_layernorm", shape("embedding.norm.weight") is not None, origin)
    layer = "decoder.layers.0"
    if "self_attention.q_norm" in scheme.modules:
        evidence.add("qk_layernorm", shape(f"{layer}.self_attention.q_norm.weight") is not None, origin)
    evidence.add("linear_bias", shape(f"{layer}.self_attention.proj.bias") is not None, origin)
    evidence.add("qkv_bias", shape(f"{layer}.self_attention.qkv.bias") is not None, origin)
    has_bias = shape("decoder.final_norm.bias") is not None
    evidence.add("normalization", "LayerNorm" if has_bias else "RMSNorm", origin)
    second = scheme.theirs(f"{layer}.mlp.fc2.weight", layers)
    if second in parts and len(parts[second][0].shape) > 1:
        evidence.add("ffn_hidden_size", parts[second][0].shape[1] * len(parts[second]), origin)


def _note_vocabulary(found: Found, parts: Parts, evidence: Evidence, stated: Stated, choices: Choices) -> None:
    """Note the true size of the vocabulary: the file's, the flags', the tokenizer's."""
    if found.vocab_size is not None:
        evidence.add("vocab_size", found.vocab_size, found.where)
    if stated.tokenizer is not None:
        tokenizer = build_tokenizer(stated.tokenizer)
        evidence.add("vocab_size", tokenizer.vocab_size, "the tokenizer")
    words = parts.get(found.scheme.theirs(WORD_EMBEDDINGS, found.num_layers), ())
    rows = sum(part.shape[0] for part in words)
    if choices.padded and not evidence.has("vocab_size"):
        evidence.add("vocab_size", rows, f"the tensors of {found.folder}")
    size = evidence.get("vocab_size")
    if size is not None and words and size > rows:
        origin = evidence.origin("vocab_size")
        if stated.tokenizer is not None:
            fix = "Give the tokenizer with which the model was trained"
        elif origin == found.where:
            fix = "Copy the checkpoint again: its files contradict each other"
        else:
            fix = f"Give {origin.split()[0]} the number of tokens of the model's tokenizer, which is at most {rows}"
        raise CheckpointError(
            f"The vocabulary has {size:,} tokens ({origin}), more than the {rows:,} rows of the embedding in "
            f"{found.folder}",
            fix=fix,
        )


class _Joiner:
    """Joins the parts of a tensor, weight or moment alike."""

    def __init__(
        self,
        found: Found,
        model: ModelConfig,
        layouts: Mapping[str, ParameterLayout],
        gate_first: bool,
        average: bool,
    ) -> None:
        self._found = found
        self._model = model
        self._layouts = layouts
        self._gate_first = gate_first
        self._average = average

    def join(self, ours: str, parts: Sequence[Part]) -> Joined:
        """Return a global tensor, named as ours."""
        arrangement = arrangement_of(ours, self._model, self._found.version, gate_first=self._gate_first)
        return Joined(parts, self._layouts[ours].tp_dim, arrangement, self._average)


def _settle_copies(joined: Mapping[str, Joined], choices: Choices, notes: list[str], what: str, folder: Path) -> None:
    """Report replicated tensors whose copies differ between tensor-parallel ranks.

    Raises:
        CheckpointError: they do, and no flag says how that is settled.
    """
    differing = differing_copies(joined)
    if not differing:
        return
    found = (
        f"The tensor-parallel ranks of {folder} differ in {what} that they should share ({len(differing)} tensors): "
        f"{describe_copies(differing)}"
    )
    if not choices.replicated:
        raise CheckpointError(
            found,
            fix="Small differences arise in training: import the mean with --replicated average, or the values of rank "
            "0 with --replicated first. Differences as large as the weights come from files of different checkpoints: "
            "copy the folder again",
        )
    how = "their mean is taken" if choices.replicated == "average" else "rank 0's are taken"
    notes.append(f"{found}; {how}")


def _imported(
    source: TensorSource,
    table: Mapping[str, str],
    layouts: Mapping[str, ParameterLayout],
    model: ModelConfig,
    found: Found,
    dtype: torch.dtype | None,
) -> ImportedTensors:
    """Return joined tensors under our names, the vocabulary's padding cut off."""
    words = source.tensors.get(table[WORD_EMBEDDINGS])
    rows = words.shape[0] if words is not None else 0
    padded = Rows(rows) if rows > model.vocab_size else Same()
    entries = [
        Entry(ours, (theirs,), padded if ours in (WORD_EMBEDDINGS, HEAD) else Same()) for ours, theirs in table.items()
    ]
    shapes = {ours: layout.shape for ours, layout in layouts.items()}
    return ImportedTensors(source, entries, shapes, found.folder, dtype=dtype)


def _adam_tensors(
    state: Mapping[str, Parts],
    weights: TensorSource,
    table: Mapping[str, str],
    layouts: Mapping[str, ParameterLayout],
    model: ModelConfig,
    joiner: _Joiner,
    choices: Choices,
    notes: list[str],
    exact: bool,
) -> list[TensorSource]:
    """Return main parameters and moments as tensors of a checkpoint."""
    sources: list[TensorSource] = []
    for kind, parts in state.items():
        joined = {theirs: joiner.join(ours, parts[theirs]) for ours, theirs in table.items() if theirs in parts}
        _settle_copies(joined, choices, notes, f"{kind} tensors", joiner._found.folder)
        imported = _imported(JoinedTensors(joined), table, layouts, model, joiner._found, torch.float32)
        named: TensorSource = Renamed(imported, f"optimizer.{kind}.")
        sources.append(_CheckedMain(named, weights, joiner._found.folder) if kind == MAIN and exact else named)
    return sources


class _CheckedMain:
    """Main parameters, each compared with the weight that is its rounding: a state that is of others is found."""

    def __init__(self, mains: TensorSource, weights: TensorSource, folder: Path) -> None:
        self._mains = mains
        self._weights = weights
        self._folder = folder

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every main parameter."""
        return self._mains.tensors

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle.

        Raises:
            CheckpointError: it is not close to the weight.
        """
        main = self._mains.read(name, rectangle)
        weight = self._weights.read(name.removeprefix(MAIN_PREFIX), rectangle)
        if not torch.allclose(main, weight.to(main.dtype), rtol=_CLOSE, atol=_CLOSE**2):
            raise CheckpointError(
                f"The optimizer state in {self._folder} does not belong to the weights: {name} differs from its weight "
                f"by up to {float((main - weight).abs().max()):.3g}",
                rule="Either the weights were changed after training, or the files are of different iterations",
                fix=f"{WEIGHTS_ONLY}, or copy {self._folder} again, all files from one checkpoint",
            )
        return main


def facts_of(found: Found) -> dict[str, str]:
    """Return what a checkpoint says of itself, for `checkpoint inspect`."""
    facts = {
        "iteration": f"{found.iteration:,}",
        "naming": found.scheme.title,
        "checkpoint version": f"{found.version:g}",
        "layers": f"{found.num_layers:,}",
        "tensor-parallel size": str(max((len(parts) for parts in found.parts.values()), default=0)),
        "args": "yes" if found.arguments is not None else "no",
    }
    if found.vocab_size is not None:
        facts["vocabulary"] = f"{found.vocab_size:,}"
    return facts
