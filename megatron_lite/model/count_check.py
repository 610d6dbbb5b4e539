"""Parameter count check: a built stage's parameters against the formula used for logged counts, FLOPs and MFU."""

from __future__ import annotations

import math

from megatron_lite.config.counts import embedding_parameters, head_parameters, stored_parameters
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.parameters import NamedParameter


def check_count(stage: GPTStage) -> None:
    """Check that layers, embedding and head of a stage have as many parameters as config/parameters.py lists.

    Global shapes are counted, so that the check needs no other rank. A tied head on a stage of its own has the name of
    the embedding's table, and is counted there; shared layers are counted once, under the first of them.

    Raises:
        AssertionError: a part has another number of parameters, or a parameter has no global name.
    """
    parameters = stage.named_parameters_global()
    named = {id(param) for parameter in parameters for param in parameter.uses}
    if unnamed := [
        f"{name} {tuple(param.shape)}" for name, param in stage.named_parameters() if id(param) not in named
    ]:
        raise AssertionError(
            f"Internal error: parameters without a global name would be neither trained nor saved: "
            f"{', '.join(unnamed)}. Give their module a method `named`, as those of parallel/layers.py have one."
        )
    model = stage.config
    layers = stored_parameters(model, stage.layer_numbers)
    expected = {f"layer {layer}": ("layer_layouts", count) for layer, count in layers.items()}
    if stage.embedding is not None:
        expected["embedding"] = ("embedding_layouts", embedding_parameters(model, model.vocab_size))
    if stage.output_layer is not None:
        expected["head"] = ("head_layouts", head_parameters(model, model.vocab_size))
    parts: dict[str, list[NamedParameter]] = {}
    for parameter in parameters:
        parts.setdefault(_part(parameter.name), []).append(parameter)
    for part, (function, count) in expected.items():
        built = parts.get(part, [])
        total = sum(math.prod(parameter.global_shape) for parameter in built)
        if total != count:
            sizes = "".join(f"\n  {p.name} {p.global_shape}: {math.prod(p.global_shape):,}" for p in built)
            raise AssertionError(
                f"Internal error: the {part} was built with {total:,} parameters, {function} of "
                f"megatron_lite/config/parameters.py lists {count:,}, and logged parameters and FLOPs would be wrong. "
                f"Built:{sizes}\nAdd what is missing to {function}, and its matrix products to layer_forward_flops "
                "(megatron_lite/config/counts.py)."
            )


def _part(name: str) -> str:
    if name.startswith("decoder.layers."):
        return f"layer {name.split('.')[2]}"
    return "embedding" if name.startswith("embedding.") else "head"
