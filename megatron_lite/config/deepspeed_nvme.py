"""NVMe offloading rules: ZeRO stage, folder, swap buffers and asynchronous I/O of the DeepSpeed engine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_lite.config.parameters import HEAD, WORD_EMBEDDINGS, parameter_layouts
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.run import RunConfig

_ZERO = "zero_optimization."
_BLOCK = 4096
"""Alignment of direct I/O on drives with sectors of 4 KiB."""


def state_tensors(config: RunConfig) -> int:
    """Return how many fp32 tensors as long as a partition the optimizer keeps: the main parameters and moments."""
    if config.optimizer.kind == "sgd":
        return 2 if config.optimizer.sgd_momentum else 1
    return 3


def optimizer_buffers(config: RunConfig) -> int:
    """Return the swap buffers that a step needs: state and gradient of each partition in memory at a time.

    pipeline_read reads the next partition during a step, and pipeline_write writes the partition before.
    """
    section = config.deepspeed.zero["offload_optimizer"]
    partitions = 1 + bool(section.get("pipeline_read")) + bool(section.get("pipeline_write"))
    return partitions * (state_tensors(config) + 1)


def nvme_offload_can_run(config: RunConfig) -> Iterator[ConfigError]:
    """Refuse offloading that DeepSpeed would refuse by an assertion, or carry out on other state than ours."""
    settings = config.deepspeed
    if settings.offload_device("optimizer") == "nvme" and _section(config, "optimizer").get("fast_init"):
        yield ConfigError(
            f"{_ZERO}offload_optimizer.fast_init in the DeepSpeed JSON is true",
            rule="It reads parameters to addresses that are not aligned for direct I/O, which fails without an error",
            fix="Remove fast_init, or write false",
        )
    for part in ("optimizer", "param"):
        if settings.offload_device(part) == "nvme" and not _section(config, part).get("nvme_path"):
            yield ConfigError(
                f'{_ZERO}offload_{part}.device in the DeepSpeed JSON is "nvme", and nvme_path is missing',
                fix=f'Add "nvme_path": a folder on a local disk, or write "device": "cpu" in offload_{part}',
            )
    if settings.offload_device("optimizer") == "nvme":
        yield from _optimizer_can_be_swapped(config)
    if settings.swaps:
        yield from _aio_can_run(config)


def _optimizer_can_be_swapped(config: RunConfig) -> Iterator[ConfigError]:
    if config.deepspeed.stage < 3:
        yield ConfigError(
            f"{_ZERO}offload_optimizer in the DeepSpeed JSON has device nvme, and the stage is "
            f"{config.deepspeed.stage}",
            rule="DeepSpeed offloads to NVMe at ZeRO stage 3 only",
            fix=f'Use {_ZERO}stage 3, or write "device": "cpu"',
        )
    given, needed = _section(config, "optimizer").get("buffer_count"), optimizer_buffers(config)
    if given is not None and given < needed:
        yield ConfigError(
            f"{_ZERO}offload_optimizer.buffer_count in the DeepSpeed JSON is {given}, and a step needs {needed}",
            rule=f"Main parameters, moments and gradients take {state_tensors(config) + 1} buffers; pipeline_read and "
            "pipeline_write as many each",
            fix=f"Write {needed} or more, or remove buffer_count",
        )


def _aio_can_run(config: RunConfig) -> Iterator[ConfigError]:
    """Refuse values with which DeepSpeed's operator would end the process."""
    section: dict[str, Any] = config.deepspeed.entries.get("aio") or {}
    if section.get("use_gds"):
        yield ConfigError(
            "aio.use_gds in the DeepSpeed JSON is true",
            rule="Swap files are read into the host's memory, where the optimizer steps",
            fix="Remove use_gds",
        )
    if (size := section.get("block_size", _BLOCK)) % _BLOCK:
        yield ConfigError(
            f"aio.block_size in the DeepSpeed JSON is {size}",
            rule=f"Direct I/O needs a multiple of {_BLOCK} bytes",
            fix=f'Write, for example, "block_size": {2**20}',
        )


def largest_part(config: RunConfig, replicas: int) -> tuple[int, str]:
    """Return the elements of a rank's largest part of a parameter, and the parameter's name.

    Args:
        config: the run, with the vocabulary size.
        replicas: ranks that parameters are partitioned over.
    """
    return max((math.ceil(numel / replicas), name) for name, numel in _local_sizes(config).items())


def _local_sizes(config: RunConfig) -> dict[str, int]:
    """Return the elements of each parameter on a tensor-parallel rank, with the padding of the vocabulary."""
    tp, padded = config.parallel.tp, max(config.model.padded_vocab_size, config.model.vocab_size)
    found = {}
    for name, layout in parameter_layouts(config.model).items():
        shape = (padded, *layout.shape[1:]) if name in (WORD_EMBEDDINGS, HEAD) else layout.shape
        found[name] = math.ceil(math.prod(shape) / (1 if layout.tp_dim is None else tp))
    return found


def swapped_bytes(config: RunConfig, replicas: int) -> dict[str, int]:
    """Return the bytes of a rank's swap files in each nvme_path.

    Args:
        config: the run, with the vocabulary size.
        replicas: ranks that parameters and state are partitioned over.
    """
    elements = math.ceil(sum(_local_sizes(config).values()) / replicas)
    width = {"optimizer": 4 * state_tensors(config), "param": config.precision.itemsize}
    found: dict[str, int] = {}
    for part, size in width.items():
        if config.deepspeed.offload_device(part) == "nvme":
            path = str(_section(config, part)["nvme_path"])
            found[path] = found.get(path, 0) + elements * size
    return found


def locked_bytes(config: RunConfig, replicas: int) -> int:
    """Return the bytes of a rank's swap buffers, which DeepSpeed locks in memory.

    Args:
        config: the run, with the vocabulary size.
        replicas: ranks that parameters and state are partitioned over.
    """
    total, sizes, largest = 0, _local_sizes(config).values(), largest_part(config, replicas)[0]
    if config.deepspeed.offload_device("optimizer") == "nvme":
        # A group ends with the parameter that fills it.
        group = config.deepspeed.zero.get("sub_group_size", 10**9) + largest
        count = _section(config, "optimizer").get("buffer_count", optimizer_buffers(config))
        total += 4 * count * min(group, math.ceil(sum(sizes) / replicas))
    if config.deepspeed.offload_device("param") == "nvme":
        section = _section(config, "param")
        total += config.precision.itemsize * section.get("buffer_count", 5) * section.get("buffer_size", largest)
    return total


def _section(config: RunConfig, part: str) -> dict[str, Any]:
    found: dict[str, Any] = config.deepspeed.zero.get(f"offload_{part}") or {}
    return found


RULES = (nvme_offload_can_run,)
