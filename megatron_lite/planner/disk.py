"""Disk usage of a run: the saves of its schedule, their sizes, and what retention keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from math import prod

from megatron_lite.config.checkpoint import CheckpointConfig
from megatron_lite.config.counts import parameter_count
from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.config.parameters import parameter_shapes
from megatron_lite.config.run import RunConfig
from megatron_lite.config.selection import select_parameters
from megatron_lite.config.sharing import LAYERS
from megatron_lite.runs.retention import expired, retention_of
from megatron_lite.schedules.length import last_iteration
from megatron_lite.schedules.saves import save_iterations

MAX_COUNTED = 100_000
"""Scheduled saves up to which the retention policy is applied one by one; of more, all are counted as kept."""


@dataclass(frozen=True)
class Storage:
    """Disk usage of a run's checkpoints.

    Attributes:
        checkpoint: bytes of one checkpoint's tensors.
        kept: checkpoints that exist at the same time at most, beside those that exist now.
        total: bytes of those, and of the weights of --weights-only-every.
        files: number of files of those.
        saves: checkpoints that the run writes.
        written: bytes that the run writes.
        weights: bytes of the tensors of a weights-only checkpoint.
        weights_only: number of weights-only checkpoints.
    """

    checkpoint: int
    kept: int
    total: int
    files: int
    saves: int
    written: int
    weights: int
    weights_only: int


def checkpoint_size(config: RunConfig) -> int:
    """Return the bytes of a checkpoint's tensors: weights, fp32 main parameters, optimizer state, moving average.

    The files add about a kilobyte for each part of a tensor. Histories of fp8 maxima are not counted.
    """
    model, full = config.model, config.precision.dtype == "fp32"
    named = replace(model, vocab_size=model.vocab_size or model.padded_vocab_size)
    frozen, size = select_parameters(replace(config, model=named)).frozen, 0
    for name, shape in parameter_shapes(named).items():
        count = prod(shape)
        size += count * (4 if full else 2)
        if name in frozen:
            continue
        size += 4 * count if config.optimizer.ema_decay else 0
        if config.checkpoint.save_optimizer:
            size += (0 if full else 4 * count) + saved_moments(config.optimizer, name, shape)
    return size


def saved_moments(optimizer: OptimizerConfig, name: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a parameter's moments in a checkpoint, where all are in fp32."""
    count, is_matrix = prod(shape), len(shape) > 1 and not name.endswith(".bias")
    match optimizer.kind:
        case "adam" | "adamw8bit":
            return 8 * count
        case "sgd":
            return 4 * count if optimizer.sgd_momentum else 0
        case "lion":
            return 4 * count
        case "muon":
            return 4 * count if is_matrix and name.startswith(f"{LAYERS}.") else 8 * count
        case "adafactor":
            second = prod(shape[:-1]) + prod(shape[:-2]) * shape[-1] if is_matrix else count
            return 4 * (second + (0 if optimizer.adafactor_beta1 is None else count))


def storage_of(config: RunConfig, existing: list[int]) -> Storage:
    """Return the disk usage of a run's future checkpoints.

    Args:
        config: its model.vocab_size should be filled in.
        existing: iterations of the checkpoints in the --save folder.
    """
    options = config.checkpoint
    size = checkpoint_size(config)
    average = 4 if config.optimizer.ema_decay else 0
    weights = parameter_count(config.model) * (average + config.precision.itemsize)
    last = last_iteration(config)
    kept, saves = _most_kept(options, existing, last), count_saves(options, max(existing, default=0), last)
    every, newest = options.weights_only_every, max(existing, default=0)
    weights_only = last // every - newest // every if every else 0
    # Each rank writes a file, and rank 0 the manifest and two small files.
    files = (kept + weights_only) * (config.parallel.world_size + 3)
    return Storage(
        size,
        kept,
        kept * size + weights_only * weights,
        files,
        saves,
        saves * size + weights_only * weights,
        weights,
        weights_only,
    )


def count_saves(options: CheckpointConfig, newest: int, last: int) -> int:
    """Return the checkpoints that are written after iteration `newest`: scheduled ones, and one at the end `last`."""
    if not options.save or last <= newest:
        return 0
    ranges = save_iterations(options, last)
    scheduled = sum(len(range(max(r.start, _after(r, newest)), r.stop, r.step)) for r in ranges)
    return scheduled + (not ranges or ranges[-1][-1] != last)


def _after(iterations: range, newest: int) -> int:
    """Return the first element above `newest`."""
    return iterations.start + max(0, (newest - iterations.start) // iterations.step + 1) * iterations.step


def _most_kept(options: CheckpointConfig, existing: list[int], last: int) -> int:
    """Return the number of checkpoints that the run adds at most to the existing ones."""
    newest = max(existing, default=0)
    ranges = save_iterations(options, last)
    saves = sum(len(iterations) for iterations in ranges)
    if not options.keep_last or saves > MAX_COUNTED:
        return count_saves(options, newest, last)
    scheduled = [iteration for iteration in chain(*ranges) if iteration > newest] or [last]
    everything = {*existing, *scheduled, last}
    deleted = expired(everything, last, retention_of(options))
    # While a checkpoint is written, the one that it replaces still exists.
    return max(1, len(everything) - len(deleted) + 1 - len(existing))
