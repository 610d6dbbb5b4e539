"""Parameters shared by pipeline stages (tied embeddings): owning stages, ranks and process group of each.

Every stage that holds a shared parameter computes a part of its gradient. Stages of one rank use one tensor; between
ranks, each has a copy, and the gradients are summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import nn

from megatron_lite.backend.group import Group
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameters import NamedParameter


@dataclass(frozen=True, eq=False)
class SharedParameter:
    """Stages and pipeline ranks that hold a parameter.

    Attributes:
        stages: global stage numbers.
        ranks: coordinates on the pp axis, each once. The first owns the parameter: norms count it, and checkpoints save
            it, there.
        group: the ranks, over which the gradient is summed; on a rank that does not hold it, a group of one.
    """

    stages: tuple[int, ...]
    ranks: tuple[int, ...]
    group: Group


class _Stage(Protocol):
    def named_parameters_global(self) -> list[NamedParameter]: ...

    def modules(self) -> Iterable[nn.Module]: ...


def shared_parameters(
    owners: Mapping[str, Sequence[int]], rank_of_stage: Sequence[int], mesh: Mesh
) -> dict[str, SharedParameter]:
    """Return the shared parameters of a model by global name; a collective call, which creates their groups.

    Args:
        owners: stages that hold each parameter, by global name; all ranks give the same.
        rank_of_stage: coordinate on the pp axis of each stage.
        mesh: of this rank.
    """
    shared = {}
    for name, stages in owners.items():
        ranks = tuple(dict.fromkeys(rank_of_stage[stage] for stage in stages))
        # Named after the module, as the group of a tied head is in Megatron: embedding.
        group = mesh.subgroup("pp", ranks, name.partition(".")[0])
        shared[name] = SharedParameter(tuple(stages), ranks, group)
    return shared


def rank_parameters(
    stages: Mapping[int, _Stage], shared: Mapping[str, SharedParameter], pp_rank: int
) -> list[NamedParameter]:
    """Return the parameters of a rank's stages, each once and in the order of the model.

    Shared parameters of several stages become one tensor, that of the first.

    Args:
        stages: by global stage number, in the order of the model.
        shared: from shared_parameters.
        pp_rank: this rank's coordinate on the pp axis.
    """
    first: dict[str, nn.Parameter] = {}
    for stage in stages.values():
        for parameter in stage.named_parameters_global():
            if parameter.name in shared and parameter.name in first:
                _replace(stage, parameter.param, first[parameter.name])
            first.setdefault(parameter.name, parameter.param)
    merged = merge_parameters(entry for stage in stages.values() for entry in stage.named_parameters_global())
    return [
        replace(parameter, owned=parameter.name not in shared or shared[parameter.name].ranks[0] == pp_rank)
        for parameter in merged
    ]


def merge_parameters(parameters: Iterable[NamedParameter]) -> list[NamedParameter]:
    """Return each tensor's first entry, with the gradients per micro-batch of all its entries added up."""
    merged: dict[int, NamedParameter] = {}
    for parameter in parameters:
        key = id(parameter.param)
        if key in merged:
            parameter = replace(merged[key], passes=merged[key].passes + parameter.passes)
        merged[key] = parameter
    return list(merged.values())


def _replace(stage: _Stage, old: nn.Parameter, new: nn.Parameter) -> None:
    """Make every module of a stage that holds the parameter `old` hold `new`."""
    for module in stage.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if param is old:
                setattr(module, name, new)
