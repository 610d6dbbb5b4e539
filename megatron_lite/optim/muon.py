"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): orthogonalized momentum for matrices of the layers.

Each matrix is orthogonalized whole: under ZeRO-1 the updates are gathered over dp first, and with tensor parallelism
over tp. A replica orthogonalizes the matrices of which it holds elements, so that ZeRO-1 divides the work, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.optim.update_rule import CHUNK, PieceState, UpdateRule, prepare, states_of_shards
from megatron_lite.parallel.buffers import ParameterBuffers, Shard, ShardPiece
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameters import NamedParameter

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic Newton-Schulz iteration of the reference implementation: singular values end between 0.7 and 1.2."""


def is_hidden_matrix(parameter: NamedParameter) -> bool:
    """Return whether Muon updates the parameter: a matrix of a layer. AdamW updates all others."""
    return parameter.name.startswith("decoder.layers.") and parameter.param.dim() > 1


@dataclass(frozen=True, eq=False)
class _Part:
    """Elements of one matrix in a shard: this rank updates them."""

    piece: ShardPiece
    value: Tensor
    decay: bool
    lr_factor: float


class Muon(UpdateRule):
    """Muon over flat shards of matrices.

    Args:
        config: hyperparameters.
        model: heads of attention, by which the QKV weight is split.
        shards: main parameters, of matrices only.
        buffers: that the shards belong to.
        mesh: this rank's groups.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        model: ModelConfig,
        shards: Sequence[Shard],
        buffers: ParameterBuffers,
        mesh: Mesh,
    ) -> None:
        self._config = config
        self._model = model
        self._shards = tuple(shards)
        self._buffers, self._mesh = buffers, mesh
        self._moments = [torch.zeros_like(shard.values) for shard in shards]
        self._names = frozenset(p.name for p in buffers.parameters if is_hidden_matrix(p))
        self._parts: dict[int, list[_Part]] = {}
        for shard in shards:
            for piece in shard.pieces:
                value = shard.values[piece.position : piece.position + piece.stop - piece.start]
                self._parts.setdefault(id(piece.parameter), []).append(
                    _Part(piece, value, shard.decay, shard.lr_factor)
                )

    def step(self, lr: float, weight_decay: float, divisor: Tensor | None, applies: Tensor) -> None:
        """Update the main parameters; a collective call over tp and, under ZeRO-1, dp."""
        applied, momentum = applies.float(), self._config.muon_momentum
        for shard, moment in zip(self._shards, self._moments, strict=True):
            for gradient, average in zip(shard.gradients.split(CHUNK), moment.split(CHUNK), strict=True):
                prepare(gradient, divisor, applies)
                average.lerp_(gradient, applied * (1.0 - momentum))
                if self._config.muon_nesterov:
                    gradient.lerp_(average, momentum)
                else:
                    gradient.copy_(average)
        self._buffers.gather_gradients(self._names)
        for parts in self._parts.values():
            parameter = parts[0].piece.parameter
            update = self._orthogonalized(parameter, self._buffers.gradient(parameter.param)).reshape(-1)
            for part in parts:
                rate = lr * part.lr_factor
                kept = 1.0 - applied * (rate * weight_decay if part.decay else 0.0)
                own = update[part.piece.start : part.piece.stop]
                part.value.mul_(kept).addcmul_(own, applied * rate, value=-1.0)

    def states(self) -> list[PieceState]:
        """Return the momentum."""
        return states_of_shards(self._shards, [{"momentum": moment} for moment in self._moments])

    @property
    def nbytes(self) -> int:
        """Return the bytes of the momentum."""
        return sum(moment.nbytes for moment in self._moments)

    def load(self, applied: int) -> None:
        """Do nothing: a step does not depend on their number."""

    def _orthogonalized(self, parameter: NamedParameter, update: Tensor) -> Tensor:
        """Return the scaled update of a parameter's local tensor, fp32.

        Args:
            parameter: split over tp or not.
            update: shaped like the parameter's local tensor.
        """
        local = parameter.local(update).bfloat16()
        tp, dim = self._mesh.tp, parameter.tp_dim
        gathers = tp.size > 1 and dim is not None and self._config.muon_tp_mode == "duplicated"
        whole = torch.cat(tp.all_gather(local.unsqueeze(0)).unbind(), dim) if gathers and dim is not None else local
        result = torch.empty_like(whole, dtype=torch.float32)
        for source, target in zip(self._matrices(parameter, whole), self._matrices(parameter, result), strict=True):
            matrix = source.reshape(-1, source.shape[-1])
            scale = self._scale(*matrix.shape)
            update = orthogonalize(matrix, self._config.muon_num_ns_steps)
            target.copy_(update.float().mul_(scale).view(source.shape))
        return result.chunk(tp.size, dim)[tp.rank] if gathers and dim is not None else result

    def _matrices(self, parameter: NamedParameter, tensor: Tensor) -> Iterator[Tensor]:
        """Yield views [..., c] of the matrices in a tensor: gate and up projection, and Q, K and V of all heads."""
        if parameter.name.endswith("self_attention.qkv.weight") and self._config.muon_split_qkv:
            model = self._model
            queries = model.num_attention_heads // model.num_query_groups
            # Megatron's order: of each query group first the queries, then key and value.
            grouped = tensor.view(-1, queries + 2, model.head_dim, tensor.shape[-1])
            yield from (grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1])
        else:
            yield from tensor.view(-1, *tensor.shape[-2:])

    def _scale(self, rows: int, columns: int) -> float:
        """Return the factor of an orthogonal update by --muon-scale-mode, as in Megatron."""
        mode = self._config.muon_scale_mode
        if mode == "spectral":
            scale = max(rows, columns) ** 0.5
        elif mode == "unit_rms_norm":
            scale = (rows / columns) ** 0.5
        else:
            scale = max(1.0, rows / columns) ** 0.5
        return scale * self._config.muon_extra_scale_factor


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Return U V^T of a matrix U S V^T approximately, in bf16, by Newton-Schulz iterations.

    Args:
        matrix: [r, c].
        steps: iterations.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
