"""Depth upscaling: writes a checkpoint of a deeper model whose layers are copies of a trained model's layers.

Tensors are copied tile by tile (rewriting.py), so memory does not depend on the size of the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_lite.checkpoint.load import averages
from megatron_lite.checkpoint.names import EMA_PREFIX, MAIN_PREFIX, has_optimizer, is_model_tensor
from megatron_lite.checkpoint.reading import CheckpointReader
from megatron_lite.checkpoint.rewriting import FILE_SIZE, check_output, write_source
from megatron_lite.checkpoint.sources import TensorInfo
from megatron_lite.checkpoint.stored_model import StoredModel, stored_model
from megatron_lite.checkpoint.writing import SaveReport, SaveRequest
from megatron_lite.config.divisors import nearest_multiples
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.config.sharing import num_groups, owner_layer
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.rectangle import Rectangle
from megatron_lite.runs.catalog import list_iterations
from megatron_lite.runs.manifest import Manifest, Provenance
from megatron_lite.schedules.progress import Progress

Order = Literal["interleave", "stack"]

_LAYER = re.compile(r"(?P<before>(?:.*\.)?decoder\.layers\.)(?P<number>\d+)\.(?P<part>\w+)(?P<after>\..+)")
_STATE_FIELDS = ("kind", "ema_decay", "sgd_momentum", "adafactor_beta1")
"""Fields of OptimizerConfig by which a run has optimizer state or not."""
_OUTPUT_PROJECTIONS = (".self_attention.proj.", ".mlp.fc2.")


@dataclass(frozen=True, kw_only=True)
class UpscaleOptions:
    """Options of an upscaling.

    Attributes:
        num_layers: layers of the new model.
        order: see source_layers.
        carry_optimizer: copy the moments and step counts; otherwise the checkpoint has weights only.
        preserve_function: set the output projections of all copies but the first of a layer to zero, so that the new
            model computes the function of the given one.
        averaged: copy the moving average of the weights instead of the weights.
        scale_residual: multiply all output projections by the factor by which the initialization scales them for the
            new depth, sqrt(layers / new layers) (GPT-2: 1 / sqrt(2 x layers)).
    """

    num_layers: int
    order: Order = "interleave"
    carry_optimizer: bool = False
    preserve_function: bool = False
    averaged: bool = False
    scale_residual: bool = False


@dataclass(frozen=True)
class UpscaleReport:
    """Result of an upscaling."""

    save: SaveReport
    sources: tuple[int, ...]
    """Layer of the given model of which each new layer is a copy."""
    before: ModelConfig
    after: StoredModel
    optimizer: OptimizerConfig
    """Carried state: the fields on which it depends, of the run that it comes from; otherwise defaults."""


def source_layers(layers: int, new_layers: int, order: Order) -> tuple[int, ...]:
    """Return for each new layer the layer of which it is a copy.

    Args:
        layers: number of layers, L.
        new_layers: number of new layers, L'.
        order: "interleave": copies of a layer follow each other, floor(i L / L') for layer i. "stack": all layers, then
            again from the first, i mod L (Gong et al. 2019, progressive stacking).

    >>> source_layers(3, 5, "interleave"), source_layers(3, 5, "stack")
    ((0, 0, 1, 1, 2), (0, 1, 2, 0, 1))
    """
    if order == "stack":
        return tuple(number % layers for number in range(new_layers))
    return tuple(number * layers // new_layers for number in range(new_layers))


def added_layers(sources: Sequence[int]) -> frozenset[int]:
    """Return the new layers that are not the first copy of their layer.

    Without them, the layers are those of the given model, in its order, whatever the order of copies.

    >>> sorted(added_layers((0, 0, 1, 2, 2)))
    [1, 4]
    """
    return frozenset(number for number, source in enumerate(sources) if source in sources[:number])


def upscale(
    path: Path,
    output: Path,
    options: UpscaleOptions,
    *,
    file_size: int = FILE_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> UpscaleReport:
    """Write a checkpoint at iteration 0 with more layers, copied from a checkpoint.

    Args:
        path: the checkpoint.
        output: folder in which the new checkpoint is saved; it must contain none.
        options: see UpscaleOptions.
        file_size: maximum bytes of a file of the new checkpoint.
        progress: called with the bytes written so far, and those of all tensors.

    Raises:
        CheckpointError: `output` contains a checkpoint, there is no room, or there is no optimizer state to carry
            or no moving average to copy. Nothing of the new checkpoint is left.
        CorruptCheckpointError: a record that is read is damaged.
        ConfigError: options contradict each other or the model.
    """
    source = CheckpointReader(path)
    manifest = source.manifest
    stored = stored_model(manifest, path)
    _check(stored.model, options, path)
    if options.carry_optimizer and not ("engine" in manifest.scalars and has_optimizer(manifest.tensors)):
        raise CheckpointError(
            f"--optimizer carry: {path} has no optimizer state",
            fix="Remove --optimizer carry, or give a checkpoint that was saved without --no-save-optim",
        )
    sources = source_layers(stored.model.num_layers, options.num_layers, options.order)
    scalars: dict[str, Any] = {"progress": Progress().to_dict()}
    if options.carry_optimizer:
        scalars["engine"] = manifest.scalars["engine"]
    request = SaveRequest(output, 0, scalars, _provenance(manifest, path, options, sources))
    if found := list_iterations(output):
        raise CheckpointError(
            f"--output {output} contains a checkpoint of iteration {found[-1]} already",
            fix="Give --output a new folder",
        )
    check_output([path], output, request)
    report = write_source(request, _Upscaled(source, stored.model, sources, options), file_size, progress)
    after = replace(stored, model=replace(stored.model, num_layers=options.num_layers))
    optimizer = manifest.provenance.config.get("optimizer", {}) if options.carry_optimizer else {}
    chosen = OptimizerConfig(**{name: optimizer[name] for name in _STATE_FIELDS if name in optimizer})
    return UpscaleReport(report, sources, stored.model, after, chosen)


class _Upscaled:
    """Tensors of the deeper model as a TensorSource.

    Args:
        source: the checkpoint of the given model.
        model: the given model.
        sources: see source_layers.
        options: see UpscaleOptions.
    """

    def __init__(
        self, source: CheckpointReader, model: ModelConfig, sources: Sequence[int], options: UpscaleOptions
    ) -> None:
        self._source = source
        self._saved_name: dict[str, str] = {}
        self._exact = averages(source) if options.averaged else {}
        zero = added_layers(sources) if options.preserve_function else frozenset()
        self._factors: dict[str, float] = {}
        scale = math.sqrt(model.num_layers / len(sources)) if options.scale_residual else 1.0
        deeper = replace(model, num_layers=len(sources))
        for name in source.tensors:
            if not is_model_tensor(name) and not options.carry_optimizer:
                continue
            match = _LAYER.fullmatch(name)
            if match is None:
                self._saved_name[name] = name
                continue
            for number, layer in enumerate(sources):
                # Shared parameters are stored under the number of their first layer.
                part, stored = match["part"], int(match["number"])
                if owner_layer(deeper, part, number) != number or owner_layer(model, part, layer) != stored:
                    continue
                new = f"{match['before']}{number}.{part}{match['after']}"
                self._saved_name[new] = name
                if _holds_weights(name) and any(projection in name for projection in _OUTPUT_PROJECTIONS):
                    self._factors[new] = 0.0 if number in zero else scale
                    # A weight is the rounding of its scaled main parameter, as a training step would leave it.
                    if scale != 1.0 and MAIN_PREFIX + name in source.tensors:
                        self._exact.setdefault(name, MAIN_PREFIX + name)
        self.tensors: Mapping[str, TensorInfo] = {
            new: source.tensors[saved] for new, saved in sorted(self._saved_name.items())
        }

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle of a tensor of the deeper model."""
        saved, factor = self._saved_name[name], self._factors.get(name, 1.0)
        dtype = getattr(torch, self.tensors[name].dtype)
        if factor == 0.0:
            return torch.zeros(rectangle.shape, dtype=dtype)
        tensor = self._source.read(self._exact.get(saved, saved), rectangle)
        return (tensor if factor == 1.0 else tensor.double() * factor).to(dtype)


def _holds_weights(name: str) -> bool:
    """Return True for weights, their main parameters and their moving averages."""
    return is_model_tensor(name) or name.startswith(EMA_PREFIX)


def _provenance(manifest: Manifest, path: Path, options: UpscaleOptions, sources: Sequence[int]) -> Provenance:
    """Return the description of the new model: it has no schedule and no data yet."""
    stored = manifest.provenance.config
    config = {name: stored[name] for name in ("model", "tokenizer", "precision")}
    config["model"] = {**stored["model"], "num_layers": options.num_layers}
    if options.carry_optimizer and "optimizer" in stored:
        config["optimizer"] = stored["optimizer"]
    config["batch"] = {"seq_length": stored.get("batch", {}).get("seq_length", 1)}
    fingerprints = {"upscaled from": f"{path.absolute()}, layers {' '.join(map(str, sources))}"}
    if "tokenizer" in manifest.provenance.fingerprints:
        fingerprints["tokenizer"] = manifest.provenance.fingerprints["tokenizer"]
    return Provenance(config, fingerprints)


def _check(model: ModelConfig, options: UpscaleOptions, path: Path) -> None:
    """Refuse options that contradict each other or the model.

    Raises:
        ConfigError: see above.
    """
    layers = model.num_layers
    if options.num_layers <= layers:
        raise ConfigError(
            f"--layers {options.num_layers} is not more than the {layers} layers of {path}",
            fix=f"Give --layers {layers + 1} or more, for example --layers {layers + -(-layers // 3)}",
        )
    groups = num_groups(model)
    if groups > 1 and options.num_layers % groups:
        raise ConfigError(
            f"--layers {options.num_layers} cannot be split into the {groups} groups of layers that share their "
            f"parameters in {path}",
            fix=f"Use --layers {nearest_multiples(options.num_layers, groups)}",
        )
    if groups > 1 and options.order == "stack":
        raise ConfigError(
            f"--order stack: the layers of {path} share their parameters in {groups} groups of consecutive layers, "
            "which stacked layers would not keep",
            fix="Use --order interleave",
        )
    if options.preserve_function and model.share_layers:
        raise ConfigError(
            f"--preserve-function: the layers of {path} share parameters (--share-layers {model.share_layers}), so "
            "that the output projections of added layers are those of other layers",
            fix="Remove --preserve-function",
        )
    if options.preserve_function and options.scale_residual:
        raise ConfigError(
            "--preserve-function and --scale-residual contradict each other: scaled output projections change the "
            "model's function",
            fix="Remove --scale-residual to keep the function, or --preserve-function",
        )
    if options.preserve_function and model.residual_post_layernorm:
        raise ConfigError(
            f"--preserve-function: the model of {path} takes its residual after the norm "
            "(--apply-residual-connection-post-layernorm), so that a layer is not the identity even if its output "
            "projections are zero",
            fix="Remove --preserve-function",
        )
