"""Parameter count check: a stage's parameters against config/counts.py, from which the log, MFU and FLOPs follow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_lite.config.counts import embedding_parameters, head_parameters, layer_parameters
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.parameters import NamedParameter


def check_count(stage: GPTStage) -> None:
    """Check that a stage has as many parameters as config/counts.py says: each layer, the embedding and the head.

    Whole tensors are counted, by their global shapes, and a tied copy is not: so the stages of a model have
    parameter_count parameters together, in any layout, and no rank needs to ask another.

    Raises:
        AssertionError: a part has other parameters than counted, or one without a global name, which would not be
            trained.
    """
    parameters = stage.named_parameters_global()
    known = {id(parameter.param) for parameter in parameters}
    if unknown := [
        f"{name} {tuple(param.shape)}" for name, param in stage.named_parameters() if id(param) not in known
    ]:
        raise AssertionError(
            f"Internal error: parameters without a global name would be neither trained nor saved: "
            f"{', '.join(unknown)}. Give their module a method `named`, as those of parallel/layers.py have one."
        )
    parts: dict[str, list[NamedParameter]] = {part: [] for part in _expected(stage)}
    for parameter in parameters:
        parts.setdefault(_part(parameter.name), []).append(parameter)
    for part, (function, count) in _expected(stage).items():
        if sum(map(_size, parts[part])) != count:
            raise AssertionError(_explain(part, parts[part], function, count))


def _expected(stage: GPTStage) -> dict[str, tuple[str, int]]:
    """By part of the stage, the function of config/counts.py that counts it, and its count."""
    model = stage.config
    expected = {f"layer {layer}": ("layer_parameters", layer_parameters(model)) for layer in stage.layer_numbers}
    if stage.embedding is not None:
        expected["embedding"] = ("embedding_parameters", embedding_parameters(model, model.vocab_size))
    if stage.has_head:
        expected["head"] = ("head_parameters", head_parameters(model, model.vocab_size))
    return expected


def _part(name: str) -> str:
    if name.startswith("decoder.layers."):
        return f"layer {name.split('.')[2]}"
    return "embedding" if name.startswith("embedding.") else "head"


def _size(parameter: NamedParameter) -> int:
    return math.prod(parameter.global_shape) if parameter.owned else 0


def _explain(part: str, built: Sequence[NamedParameter], function: str, count: int) -> str:
    sizes = "".join(f"\n  {p.name} {p.global_shape}: {_size(p):,}" for p in built)
    return (
        f"Internal error: the {part} was built with {sum(map(_size, built)):,} parameters, {function} of "
        f"megatron_lite/config/counts.py counts {count:,}, and the log's parameters and FLOPs would be wrong. "
        f"Built:{sizes}\nAdd what is missing to {function}, and its matrix products to layer_forward_flops."
    )
