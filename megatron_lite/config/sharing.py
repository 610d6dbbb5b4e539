"""Layer sharing: which layers of a model use the same parameters (ALBERT, Lan et al. 2019, arXiv:1909.11942).

Shared parameters are stored once, under the number of the first layer that uses them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_lite.config.flag import Format
from megatron_lite.config.values import read_int

if TYPE_CHECKING:
    from megatron_lite.config.model import ModelConfig

PARTS = ("input_norm", "self_attention", "pre_mlp_norm", "mlp")
"""Modules of a transformer layer."""
_SHARED_PART = {"attention": "self_attention", "mlp": "mlp"}
LAYERS = "decoder.layers"


def read_sharing(args: Sequence[str]) -> str:
    """Read a value of --share-layers; one group is `all`.

    Raises:
        ValueError: it is neither a part nor a positive number.
    """
    text = args[0].lower()
    if text == "all" or text in _SHARED_PART:
        return text
    try:
        groups = read_int(text)
    except ValueError:
        groups = 0
    if groups < 1:
        raise ValueError("all, attention, mlp, or a number of groups")
    return "all" if groups == 1 else str(groups)


SHARING = Format(
    metavar="{all,GROUPS,attention,mlp}",
    example="all",
    read=read_sharing,
    write=lambda value: [value],
    count="one",
)


def num_groups(model: ModelConfig) -> int:
    """Return the number of groups of consecutive layers that share all parameters; 0: layers do not share all."""
    if model.share_layers == "all":
        return 1
    return int(model.share_layers) if model.share_layers.isdecimal() else 0


def owner_layer(model: ModelConfig, part: str, layer: int) -> int:
    """Return the first of the layers that share a part (one of PARTS) with a layer; the layer itself if none does."""
    if groups := num_groups(model):
        size = max(1, model.num_layers // groups)
        return layer // size * size
    return 0 if part == _SHARED_PART.get(model.share_layers) else layer


def stored_name(model: ModelConfig, name: str) -> str:
    """Return the global name of a module or parameter, given its path in the model; shared ones have one name."""
    match = re.fullmatch(rf"{re.escape(LAYERS)}\.(\d+)\.(\w+)(.*)", name)
    if match is None:
        return name
    return f"{LAYERS}.{owner_layer(model, match[2], int(match[1]))}.{match[2]}{match[3]}"


def shared_modules(model: ModelConfig) -> dict[str, range]:
    """Return the modules that several layers share, by global name, each with the numbers of these layers."""
    layers = range(model.num_layers)
    if groups := num_groups(model):
        size = model.num_layers // groups
        return {f"{LAYERS}.{first}": layers[first : first + size] for first in layers[::size]} if size > 1 else {}
    part = _SHARED_PART.get(model.share_layers)
    return {f"{LAYERS}.0.{part}": layers} if part and len(layers) > 1 else {}


def describe_sharing(model: ModelConfig) -> str:
    """Return the sharing in parentheses, for a text that gives the number of layers; empty: nothing is shared."""
    if not shared_modules(model):
        return ""
    groups = num_groups(model)
    if groups:
        return f" ({groups} sets of parameters)" if groups > 1 else " (one set of parameters)"
    return f" (one {model.share_layers.replace('mlp', 'MLP')} for all)"
