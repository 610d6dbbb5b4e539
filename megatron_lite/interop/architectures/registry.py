"""Mapping registry: selects the Hugging Face mapping for a config.json (import) or a model (export)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.config.model import ModelConfig
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.interop.architectures.algpt2 import ALGPT2
from megatron_lite.interop.architectures.base import Architecture, sharing_problems
from megatron_lite.interop.architectures.bloom import Bloom
from megatron_lite.interop.architectures.gpt2 import GPT2
from megatron_lite.interop.architectures.gpt_neox import GPTNeoX
from megatron_lite.interop.architectures.keys import ConfigKeys
from megatron_lite.interop.architectures.llama import Llama, Mistral, Qwen2, Qwen3

ARCHITECTURES: Sequence[Architecture] = (GPT2(), Bloom(), Llama(), Qwen2(), Qwen3(), GPTNeoX(), Mistral(), ALGPT2())
EXPORTED = tuple(one.name for one in ARCHITECTURES if one.exports)


def architecture_of_config(keys: ConfigKeys) -> Architecture:
    """Return the architecture that a config.json names.

    Raises:
        CheckpointError: it is not supported, or model_type and architectures contradict each other.
    """
    model_type, classes = keys.take("model_type", default=None), keys.take("architectures", default=[])
    found = [one for one in ARCHITECTURES if one.model_type == model_type]
    by_class = next((one for one in ARCHITECTURES if classes and one.name in classes), None)
    if model_type is None and by_class is not None:
        raise CheckpointError(
            f"{keys.path} has no model_type",
            fix=f'If the model is a {by_class.name}, as its architectures state, add "model_type": '
            f'"{by_class.model_type}" to the file; otherwise download the file again',
        )
    if not found:
        raise CheckpointError(
            f"The architecture of {keys.path} is not supported: model_type={model_type!r}, architectures={classes!r}",
            fix="Import a model of one of these: "
            + ", ".join(f"{one.model_type} ({one.name})" for one in ARCHITECTURES),
        )
    expected = {found[0].name, found[0].name.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")}
    if by_class is not None and by_class is not found[0]:
        raise CheckpointError(
            f"{keys.path} contradicts itself: model_type is {model_type!r} and architectures {classes!r}",
            fix=f'Download the file again; or, if you know the model, set architectures to ["{found[0].name}"], or '
            f'model_type to "{by_class.model_type}"',
        )
    if classes and not expected & set(classes):
        raise CheckpointError(
            f"{keys.path} is not the config of a causal language model: model_type={model_type!r}, "
            f"architectures={classes!r}",
            fix=f'Import a causal language model; if this is one, set architectures to ["{found[0].name}"] in the file',
        )
    return found[0]


def architecture_for(model: ModelConfig, wanted: str = "") -> Architecture:
    """Return the class that a model is exported as.

    Args:
        model: the model.
        wanted: the class to use (--architecture); empty: the first that can express the model.

    Raises:
        ConfigError: no class, or not the wanted one, can express it; the properties at fault are named.
    """
    candidates = [one for one in ARCHITECTURES if one.exports and wanted in ("", one.name)]
    if not candidates:
        raise ConfigError(
            f"Models cannot be exported as --architecture {wanted}",
            fix=f"Use one of {', '.join(EXPORTED)}, or remove --architecture to have the class chosen",
        )
    problems = {one.name: list(one.problems(model)) for one in candidates}
    for one in candidates:
        if not problems[one.name]:
            return one
    nearest = min(problems, key=lambda name: len(problems[name]))
    differences = ", ".join(problems[nearest])
    able = [one.name for one in ARCHITECTURES if one.exports and not list(one.problems(model))]
    if wanted:
        raise ConfigError(
            f"--architecture {wanted} does not compute this model, because of {differences}",
            fix=f"Use --architecture {able[0]}"
            if able
            else "Remove --architecture to see what each class supports"
            if list(sharing_problems(model))
            else "Use `megatron-lite export --to megatron`",
        )
    listed = "\n".join(f"  {name}: {', '.join(found)}" for name, found in problems.items())
    raise ConfigError(
        f"No class of transformers computes this model; the nearest, {nearest}, fails only on {differences}. Each "
        f"class fails on:\n{listed}\n",
        fix=("Train" if list(sharing_problems(model)) else "Use `megatron-lite export --to megatron`, or train")
        + f" a model that {nearest} can compute",
    )
