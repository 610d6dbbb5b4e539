"""Model loading for generation and evaluation: config, weights and tokenizer from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.backend.select import select_backend
from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.stored_model import require_tokenizer, stored_model
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.optimizer import PrecisionConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.errors import CheckpointError
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams
from megatron_lite.parallel.tensors import parameter_tensor
from megatron_lite.runs.catalog import find_checkpoint
from megatron_lite.runs.manifest import Manifest, read_manifest
from megatron_lite.tokenizer.base import Tokenizer
from megatron_lite.tokenizer.build import build_tokenizer


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """Trained model with its tokenizer and configuration."""

    stage: GPTStage
    tokenizer: Tokenizer
    config: RunConfig
    """Model, tokenizer and precision of the run; batch and parallelism of one device."""
    path: Path
    """Checkpoint folder."""
    iteration: int


def restore_model(
    load: str,
    iteration: int,
    runtime: RuntimeConfig,
    *,
    tokenizer: Mapping[str, Any] | None = None,
    notify: Callable[[str], None] = print,
) -> TrainedModel:
    """Build the model of a checkpoint on one device and load its weights.

    On a CPU the weights are converted to fp32, which is faster than half precision there and exact.

    Args:
        load: --save folder of a run, or a checkpoint folder.
        iteration: iteration of the checkpoint; 0: the latest.
        runtime: device and CPU threads.
        tokenizer: fields of TokenizerConfig that replace those in the manifest, for moved files.
        notify: called with messages about the choice of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ConfigError: the tokenizer differs from that of the training.
        DataError: a file of the tokenizer is missing.
    """
    path = find_checkpoint(load, iteration, notify=notify)
    if path is None:
        raise CheckpointError(
            f"--load {load} {'contains no checkpoint' if Path(load).is_dir() else 'does not exist'}",
            fix="Give --load the --save folder of a run, or the folder iter_… of one of its checkpoints",
        )
    manifest = read_manifest(path)
    config = _config(manifest, path, runtime, tokenizer or {})
    built = build_tokenizer(config.tokenizer)
    require_tokenizer(built, manifest, path)
    backend = select_backend(config.runtime, config.parallel)
    if backend.name == "cpu":
        config = dataclasses.replace(config, precision=PrecisionConfig(dtype="fp32"))
    mesh = build_mesh(backend, config.parallel)
    stage = GPTStage(
        config, range(config.model.num_layers), mesh, RngStreams(config.runtime.seed, backend, mesh.tp.rank)
    )
    tensors = [parameter_tensor(entry, write=False) for entry in stage.named_parameters_global()]
    load_checkpoint(path, tensors, mesh.world, weights_only=True)
    return TrainedModel(stage, built, config, path, manifest.iteration)


def _config(manifest: Manifest, path: Path, runtime: RuntimeConfig, tokenizer: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of the stored model, with the batch and layout of one device."""
    stored = stored_model(manifest, path)
    return RunConfig(
        model=stored.model,
        tokenizer=dataclasses.replace(stored.tokenizer, **tokenizer),
        precision=stored.precision,
        batch=BatchConfig(seq_length=stored.seq_length, micro_batch_size=1),
        parallel=ParallelConfig(),
        runtime=runtime,
    )
