"""Choice of the update rule of a run by --optimizer."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.config.run import RunConfig
from megatron_lite.optim.adafactor import Adafactor
from megatron_lite.optim.adamw8bit import AdamW8bit
from megatron_lite.optim.lion import Lion
from megatron_lite.optim.muon import Muon, is_hidden_matrix
from megatron_lite.optim.update_rule import Chain, TorchRule, UpdateRule, ranges_of
from megatron_lite.parallel.buffers import ParameterBuffers, Shard
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameters import NamedParameter


def select_rule(config: RunConfig, shards: Sequence[Shard], buffers: ParameterBuffers, mesh: Mesh) -> UpdateRule:
    """Create the update rule.

    Args:
        config: the run.
        shards: those of `buffers`, with main parameters as values.
        buffers: this rank's parameters.
        mesh: this rank's groups.
    """
    optimizer = config.optimizer
    fused = mesh.backend.capabilities().fused_adam
    match optimizer.kind:
        case "adafactor":
            trained = [parameter for parameter in buffers.parameters if parameter.trained]
            return Adafactor(optimizer, shards, trained, mesh, sharded=buffers.sharded)
        case "lion":
            return Lion(optimizer.lion_beta1, optimizer.lion_beta2, shards)
        case "muon":
            rest = ranges_of(shards, lambda parameter: not is_hidden_matrix(parameter))
            return Chain(
                TorchRule("adam", optimizer, rest, fused=fused),
                Muon(optimizer, config.model, ranges_of(shards, is_hidden_matrix), buffers, mesh),
            )
        case "adamw8bit":
            return Chain(
                TorchRule("adam", optimizer, ranges_of(shards, lambda p: not _is_matrix(p)), fused=fused),
                AdamW8bit(optimizer, ranges_of(shards, _is_matrix, joined=False)),
            )
        case kind:
            return TorchRule(kind, optimizer, shards, fused=fused)


def _is_matrix(parameter: NamedParameter) -> bool:
    return parameter.param.dim() > 1
