"""Model loading for generation and evaluation: config, weights and tokenizer, for any tensor and pipeline size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.backend.agreement import broadcast_from_rank0
from megatron_lite.backend.base import Backend
from megatron_lite.backend.select import select_backend
from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.stored_model import require_tokenizer, stored_model
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.divisors import divisors
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import PrecisionConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.partition import stage_layers
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.config.vocabulary import padded_vocab_size
from megatron_lite.errors import CheckpointError, ConfigError, NotFiniteError
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import Mesh, build_mesh
from megatron_lite.parallel.random import RngStreams
from megatron_lite.parallel.tensors import parameter_tensor
from megatron_lite.runs.catalog import find_checkpoint, iteration_of, list_iterations
from megatron_lite.runs.manifest import Manifest, read_manifest
from megatron_lite.tokenizer.base import Tokenizer
from megatron_lite.tokenizer.build import build_tokenizer


@contextmanager
def naming_checkpoint(path: Path) -> Iterator[None]:
    """Name the checkpoint, and the others of its run, in a NotFiniteError."""
    try:
        yield
    except NotFiniteError as error:
        others = [str(iteration) for iteration in list_iterations(path.parent) if iteration != iteration_of(path)]
        raise NotFiniteError(
            f"{error.problem}: the weights of {path} contain NaN or infinity, or overflow",
            fix=f"Give --load-iteration another checkpoint of {path.parent} ({', '.join(others[-5:])})"
            if others
            else "Give --load another run: this one has no other checkpoint",
        ) from error


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """Trained model with its tokenizer and configuration."""

    stage: GPTStage
    """Stage of this rank: the whole model without pipeline parallelism."""
    mesh: Mesh
    tokenizer: Tokenizer
    config: RunConfig
    """Model, tokenizer and precision of the run; batch of one sample, and the layout that was asked for."""
    path: Path
    """Checkpoint folder."""
    iteration: int
    averaged: bool = False
    """Whether the weights are the moving averages of the run's (--ema-decay)."""


def restore_model(
    load: str,
    iteration: int,
    runtime: RuntimeConfig,
    *,
    parallel: ParallelConfig | None = None,
    backend: Backend | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    averaged: bool = False,
    notify: Callable[[str], None] = print,
) -> TrainedModel:
    """Build the model of a checkpoint and load its weights, on one device or on the ranks of a layout.

    On a CPU the weights are converted to fp32, which is faster than half precision there and exact.

    Args:
        load: --save folder of a run, or a checkpoint folder.
        iteration: iteration of the checkpoint; 0: the latest.
        runtime: device and CPU threads.
        parallel: tensor- and pipeline-parallel sizes; None: one device. With several ranks a collective call.
        backend: of this rank; None: a new one.
        tokenizer: fields of TokenizerConfig that replace those in the manifest, for moved files.
        averaged: load the moving average of the weights (--ema-decay) instead of the weights.
        notify: called with messages about the choice of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or has no moving average.
        ConfigError: the tokenizer differs from that of the training, or the layout does not divide the model.
        DataError: a file of the tokenizer is missing.
    """
    parallel = parallel or ParallelConfig()
    backend = backend or select_backend(runtime, parallel)
    mesh = build_mesh(backend, parallel)
    # On rank 0 alone: a network folder may show ranks different checkpoints for a moment.
    path, manifest = broadcast_from_rank0(mesh.world, lambda: _find(load, iteration, notify))
    config = _config(manifest, path, runtime, parallel, tokenizer or {})
    built = build_tokenizer(config.tokenizer)
    require_tokenizer(built, manifest, path)
    if backend.name == "cpu":
        config = dataclasses.replace(config, precision=PrecisionConfig(dtype="fp32"))
    layers = stage_layers(config.model, config.parallel, config.batch.seq_length)[mesh.pp.rank]
    stage = GPTStage(config, layers, mesh, RngStreams(config.runtime.seed, backend, mesh.tp.rank))
    return load_weights(TrainedModel(stage, mesh, built, config, path, manifest.iteration, averaged), path)


def load_weights(model: TrainedModel, path: Path) -> TrainedModel:
    """Load the weights of a checkpoint of the same run, or their moving average, into a model; a collective call.

    Raises:
        CheckpointError: the checkpoint is damaged, holds another model, or has no moving average.
    """
    tensors = [parameter_tensor(entry, write=False) for entry in model.stage.named_parameters_global()]
    load_checkpoint(path, tensors, model.mesh.world, weights_only=True, averaged=model.averaged)
    return dataclasses.replace(model, path=path, iteration=iteration_of(path) or 0)


def _find(load: str, iteration: int, notify: Callable[[str], None]) -> tuple[Path, Manifest]:
    path = find_checkpoint(load, iteration, notify=notify)
    if path is None:
        raise CheckpointError(
            f"--load {load} {'contains no checkpoint' if Path(load).is_dir() else 'does not exist'}",
            fix="Give --load the --save folder of a run, or the folder iter_… of one of its checkpoints",
        )
    return path, read_manifest(path)


def _config(
    manifest: Manifest, path: Path, runtime: RuntimeConfig, parallel: ParallelConfig, tokenizer: Mapping[str, Any]
) -> RunConfig:
    """Return the configuration of the stored model, with a batch of one sample and the given layout."""
    stored = stored_model(manifest, path)
    _check_layout(stored.model, parallel)
    model = stored.model
    if parallel.tp > 1:
        padded = padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by, parallel.tp)
        model = dataclasses.replace(model, padded_vocab_size=padded)
    return RunConfig(
        model=model,
        tokenizer=dataclasses.replace(stored.tokenizer, **tokenizer),
        precision=stored.precision,
        batch=BatchConfig(seq_length=stored.seq_length, micro_batch_size=1),
        parallel=parallel,
        runtime=runtime,
    )


def _check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a layout that does not divide the model.

    Raises:
        ConfigError: see above.
    """
    sizes = {"heads": model.num_attention_heads, "query groups": model.num_query_groups, "MLP": model.ffn_hidden_size}
    common = math.gcd(*sizes.values())
    if common % parallel.tp:
        described = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"Cannot split the layers of this model ({described}) over {parallel.tp} tensor-parallel ranks "
            f"(--tensor-model-parallel-size {parallel.tp})",
            fix=f"Use --tensor-model-parallel-size {divisors(common)}",
        )
    if parallel.pp > model.num_layers:
        raise ConfigError(
            f"Cannot split the {model.num_layers} layers of this model over {parallel.pp} pipeline stages "
            f"(--pipeline-model-parallel-size {parallel.pp})",
            fix=f"Use --pipeline-model-parallel-size {model.num_layers} or less",
        )
