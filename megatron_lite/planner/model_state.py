"""Bytes of weights, gradients and optimizer state of one rank: the layout of its flat buffers, without tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

from megatron_lite.config.buckets import BucketRange, partition
from megatron_lite.config.layout import AXES, Coordinates
from megatron_lite.config.parameters import HEAD, WORD_EMBEDDINGS, shared_stages, stage_parameters
from megatron_lite.config.partition import stage_layers
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import QUANTIZATION_BLOCK
from megatron_lite.config.selection import select_parameters
from megatron_lite.config.sharing import LAYERS
from megatron_lite.schedules.pipeline import rank_of_stage

GRADIENT_BYTES = 4
"""Bytes per parameter of the fp32 gradient buffer."""


class RankParameter(NamedTuple):
    """Parameter on one rank.

    Attributes:
        numel: elements on the rank, padded rows of the vocabulary included.
        shape: local shape, without padded rows.
        module: module of which other pipeline ranks have copies; empty: none.
    """

    name: str
    numel: int
    shape: tuple[int, ...]
    module: str
    lr_factor: float
    trained: bool

    @property
    def is_matrix(self) -> bool:
        """True for weights, which weight decay applies to; False for biases and norms."""
        return len(self.shape) > 1 and not self.name.endswith(".bias")


class _Piece(NamedTuple):
    """Elements [start, stop) of a parameter, at `position` of a shard."""

    parameter: RankParameter
    start: int
    stop: int
    position: int


class _Shard(NamedTuple):
    """Range of a buffer that the optimizer updates as one tensor."""

    length: int
    pieces: tuple[_Piece, ...]


def state_bytes(config: RunConfig, at: Coordinates) -> dict[str, int]:
    """Return the bytes of a rank's parameters, gradients and optimizer state by kind, with padding.

    They equal those of the engine that a rehearsal builds (NativeEngine.state_bytes).

    Args:
        config: the run, with the vocabulary size.
        at: coordinates of the rank.
    """
    parallel, parameters = config.parallel, rank_parameters(config, at["pp"], at["tp"])
    is_fp32 = config.precision.dtype == "fp32"
    itemsize = 4 if is_fp32 else 2
    replicas = parallel.dp * parallel.cp
    sharded = parallel.distributed_optimizer and replicas > 1
    replica = at["cp"] + parallel.cp * at["dp"] if sharded else None
    shards: list[_Shard] = []
    elements = 0
    for members, buckets in _buffers(parameters, parallel.bucket_megabytes * 2**20 // 4, replicas if sharded else 1):
        elements += buckets[-1].stop
        shards += _shards(members, buckets, replica, replicas)
    owned = sum(shard.length for shard in shards)
    frozen = sum(parameter.numel for parameter in parameters if not parameter.trained)
    found = {
        "parameters": itemsize * (elements + frozen),
        "gradients": GRADIENT_BYTES * elements,
        "main parameters": 0 if is_fp32 else 4 * owned,
        "moments": _moments(config, parameters, shards, owned),
    }
    if config.optimizer.ema_decay:
        found["average"] = 4 * owned
    if config.fp8.format != "off" and config.fp8.recipe == "delayed":
        found["fp8 histories"] = _fp8_history(config, at["pp"])
    return found


def states_of_stages(config: RunConfig) -> tuple[dict[str, int], ...]:
    """Return state_bytes of the first rank of each pipeline stage; cached, for layouts that differ in other things."""
    return _states_of_stages(_StateConfig(config))


class _StateConfig:
    """Config that equals others with the same model state: a key for caching."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._key = (
            config.model,
            config.parallel,
            config.optimizer,
            config.precision.dtype,
            config.fp8,
            config.tuning,
            config.batch.seq_length,
        )

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _StateConfig) and self._key == other._key


@lru_cache(maxsize=4096)
def _states_of_stages(key: _StateConfig) -> tuple[dict[str, int], ...]:
    config, model, parallel = key.config, key.config.model, key.config.parallel
    layers = stage_layers(model, parallel, config.batch.seq_length)
    ranks = [rank_of_stage(parallel.pipeline_schedule, parallel.pp, stage) for stage in range(len(layers))]
    # Without these, stages of equally many layers differ at the ends of the model only.
    are_alike = not (model.share_layers or config.tuning.freeze or config.tuning.lr_factors or config.fp8.bf16_ends)
    found: dict[tuple[object, ...], dict[str, int]] = {}
    states = []
    for pp_rank in range(parallel.pp):
        own = [layers[stage] for stage, rank in enumerate(ranks) if rank == pp_rank]
        kind: tuple[object, ...] = (pp_rank,)
        if are_alike:
            kind = tuple((len(part), part.start == 0, part.stop == model.num_layers) for part in own)
        if kind not in found:
            found[kind] = state_bytes(config, {**dict.fromkeys(AXES, 0), "pp": pp_rank})
        states.append(found[kind])
    return tuple(states)


def rank_parameters(config: RunConfig, pp_rank: int, tp_rank: int) -> tuple[RankParameter, ...]:
    """Return the parameters of a rank, each once, in the order of the model."""
    model, parallel = config.model, config.parallel
    layers = stage_layers(model, parallel, config.batch.seq_length)
    selection = select_parameters(config)
    ranks = [rank_of_stage(parallel.pipeline_schedule, parallel.pp, stage) for stage in range(len(layers))]
    copied = [
        name for name, stages in shared_stages(model, layers).items() if len({ranks[stage] for stage in stages}) > 1
    ]
    found: dict[str, RankParameter] = {}
    rows = model.vocab_rows // parallel.tp
    for stage, rank in enumerate(ranks):
        if rank != pp_rank:
            continue
        for name, (shape, tp_dim) in stage_parameters(model, layers[stage]).items():
            if name in found:
                continue
            if name in (WORD_EMBEDDINGS, HEAD):
                numel = rows * shape[1]
                own = min(rows * (tp_rank + 1), shape[0]) - min(rows * tp_rank, shape[0])
                local: tuple[int, ...] = (own, shape[1])
            elif tp_dim is None:
                numel, local = prod(shape), shape
            else:
                numel = prod(shape) // parallel.tp
                local = tuple(size // parallel.tp if dim == tp_dim else size for dim, size in enumerate(shape))
            module = next((module for module in copied if name == module or name.startswith(f"{module}.")), "")
            factor = selection.factors.get(name, 1.0)
            found[name] = RankParameter(name, numel, local, module, factor, name not in selection.frozen)
    return tuple(found.values())


def _buffers(
    parameters: Sequence[RankParameter], bucket_elements: int, parts: int
) -> list[tuple[list[RankParameter], list[BucketRange]]]:
    """Return the parameters of each flat buffer (one for each weight decay and learning rate), and its buckets."""
    classes: dict[tuple[bool, float], list[RankParameter]] = {}
    for parameter in parameters:
        if parameter.trained:
            classes.setdefault((parameter.is_matrix, parameter.lr_factor), []).append(parameter)
    return [
        (
            members,
            partition(
                [parameter.numel for parameter in members],
                bucket_elements=bucket_elements,
                parts=parts,
                modules=[parameter.module for parameter in members],
            ),
        )
        for members in classes.values()
    ]


def _shards(
    members: Sequence[RankParameter], buckets: Sequence[BucketRange], replica: int | None, replicas: int
) -> list[_Shard]:
    """Return the shards of one buffer: the slices of a replica, or (None) all of the buffer."""
    if replica is None:
        pieces = [
            _Piece(members[number], 0, members[number].numel, start)
            for bucket in buckets
            for number, start in bucket.placements
        ]
        return [_Shard(buckets[-1].stop, tuple(pieces))]
    found = []
    for bucket in buckets:
        length = (bucket.stop - bucket.start) // replicas
        begin = bucket.start + replica * length
        end = begin + length
        pieces = [
            _Piece(
                members[number],
                max(start, begin) - start,
                min(start + members[number].numel, end) - start,
                max(start, begin) - begin,
            )
            for number, start in bucket.placements
            if start < end and start + members[number].numel > begin
        ]
        found.append(_Shard(length, tuple(pieces)))
    return found


def _moments(config: RunConfig, parameters: Sequence[RankParameter], shards: Sequence[_Shard], owned: int) -> int:
    optimizer = config.optimizer
    match optimizer.kind:
        case "adam":
            return 8 * owned
        case "sgd":
            return 4 * owned if optimizer.sgd_momentum else 0
        case "lion":
            return 4 * owned
        case "muon":
            rest = _joined(shards, lambda parameter: not is_hidden_matrix(parameter))
            return 8 * rest + 4 * _joined(shards, is_hidden_matrix)
        case "adafactor":
            vectors = sum(
                prod(parameter.shape[:-1]) + prod(parameter.shape[:-2]) * parameter.shape[-1]
                if parameter.is_matrix
                else 0
                for parameter in parameters
                if parameter.trained
            )
            lengths = (
                piece.stop - piece.start for shard in shards for piece in shard.pieces if not piece.parameter.is_matrix
            )
            return 4 * (vectors + sum(lengths) + (0 if optimizer.adafactor_beta1 is None else owned))
        case "adamw8bit":
            blocks = sum(
                -(-(piece.stop - piece.start) // QUANTIZATION_BLOCK)
                for shard in shards
                for piece in shard.pieces
                if piece.parameter.is_matrix
            )
            rest = _joined(shards, lambda parameter: not parameter.is_matrix)
            return 8 * rest + 2 * blocks * (QUANTIZATION_BLOCK + 4)


def is_hidden_matrix(parameter: RankParameter) -> bool:
    """Return whether Muon updates a parameter: a matrix of a layer."""
    return parameter.name.startswith(f"{LAYERS}.") and parameter.is_matrix


def _joined(shards: Iterable[_Shard], wanted: Callable[[RankParameter], bool]) -> int:
    """Return the elements of the ranges of wanted parameters, with the padding between neighbours."""
    total = 0
    for shard in shards:
        end: int | None = None
        for piece in shard.pieces:
            if not wanted(piece.parameter):
                end = None
                continue
            stop = piece.position + piece.stop - piece.start
            total += stop - (piece.position if end is None else end)
            end = stop
    return total


def _fp8_history(config: RunConfig, pp_rank: int) -> int:
    """Return the bytes of the histories of delayed fp8 scaling: fp32, for 3 operands of each linear layer."""
    fp8, parallel, model = config.fp8, config.parallel, config.model
    first, last = (fp8.bf16_start, model.num_layers - fp8.bf16_end) if fp8.bf16_ends else (0, model.num_layers)
    layers = sum(
        first <= layer < last
        for stage, own in enumerate(stage_layers(model, parallel, config.batch.seq_length))
        if rank_of_stage(parallel.pipeline_schedule, parallel.pp, stage) == pp_rank
        for layer in own
    )
    return 4 * layers * fp8.amax_history_len * 3 * 4
