"""Readers of values in Megatron-LM and DeepSpeed state dicts: nested keys, args, checkpoint version, scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_lite.errors import CheckpointError
from megatron_lite.interop.megatron.arrangements import VERSIONS
from megatron_lite.interop.megatron.naming import NO_PARAMETERS, canonical
from megatron_lite.interop.unpickling import Values


def flatten(content: Mapping[Any, Any], where: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a nested state dict under their canonical names, in its order.

    Raises:
        CheckpointError: something else than a tensor is in it.
    """
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, where, f"{name}.")
        elif NO_PARAMETERS.fullmatch(name):
            continue
        elif isinstance(value, Tensor):
            yield canonical(name), value
        else:
            raise CheckpointError(
                f"The entry {name} of the model in {where} is of the Python type {type(value).__name__} instead of a "
                "tensor",
                fix="Import the checkpoint of a plain GPT",
            )


def mapping_of(content: Any, where: Path) -> Mapping[str, Any]:
    """Return a file's content, which must be a dict."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{where} is not a file of a checkpoint: it contains a Python {type(content).__name__} instead of a dict",
            fix="Give a checkpoint folder of Megatron-LM or Megatron-DeepSpeed",
        )
    return content


def arguments_of(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the args by name; None: there are none."""
    args = content.get("args")
    if isinstance(args, Values):
        return vars(args)
    return args if isinstance(args, Mapping) else None


def version_of(content: Mapping[str, Any], where: str, stated: float | None, default: float) -> float:
    """Return the checkpoint version.

    Args:
        content: of the file.
        where: the file.
        stated: what the command line says.
        default: of a file that does not say it.

    Raises:
        CheckpointError: it is unknown, or the command line says another one.
    """
    found = content.get("checkpoint_version")
    if found is not None and stated is not None and float(found) != stated:
        raise CheckpointError(
            f"--checkpoint-version {stated:g} differs from checkpoint_version {found} in {where}",
            fix="Remove --checkpoint-version",
        )
    version = default if found is None and stated is None else stated if found is None else found
    if not isinstance(version, (int, float)) or float(version) not in VERSIONS:
        raise CheckpointError(
            f"{where} has the unknown checkpoint_version {version!r}"
            if found is not None
            else f"--checkpoint-version {stated:g} does not exist",
            rule="The version decides the order of the QKV rows; known versions are "
            + ", ".join(f"{known:g}" for known in VERSIONS),
            fix="Copy the file again if it may be damaged; otherwise load and save the checkpoint with a current "
            "Megatron-LM, which writes version 3, and import that"
            if found is not None
            else f"Give --checkpoint-version one of these, or remove it to read {where} as version {default:g}",
        )
    return float(version)


def original_vocab_size(content: Mapping[str, Any], arguments: Mapping[str, Any] | None) -> int | None:
    """Return the true size of the vocabulary; None: the file does not say it."""
    info = content.get("checkpoint_info")
    if isinstance(info, Mapping) and isinstance(info.get("original_vocab_size"), int):
        return int(info["original_vocab_size"])
    args = arguments or {}
    size = args.get("vocab_size")
    if args.get("tokenizer_type") == "NullTokenizer" and isinstance(size, int):
        return size + 1  # and its end-of-document token
    return None


def scheduler_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state of the learning-rate scheduler."""
    for name in ("opt_param_scheduler", "lr_scheduler"):
        if isinstance(content.get(name), Mapping):
            return dict(content[name])
    return {}


def plain_value(value: Any) -> Any:
    """Return a value of args as a JSON value."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    return str(value)
