"""Shared parameters: modules that several layers or pipeline stages hold (tied embeddings, shared layers).

Every holder has an nn.Parameter of its own, so that each of its gradients is accumulated in fp32 when it arrives. Those
of one rank are views of one tensor; between ranks, each has a copy, and the gradients are summed over the ranks.
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
class SharedModule:
    """Stages and pipeline ranks that hold a module, or one parameter of it.

    Attributes:
        stages: global stage numbers.
        ranks: coordinates on the pp axis, each once. The first owns the parameters: norms count them, and checkpoints
            save them, there.
        group: the ranks, over which the gradients are summed; on a rank that does not hold it, a group of one.
    """

    stages: tuple[int, ...]
    ranks: tuple[int, ...]
    group: Group


class _Stage(Protocol):
    def named_parameters_global(self) -> list[NamedParameter]: ...


def locate_shared_modules(
    owners: Mapping[str, Sequence[int]], rank_of_stage: Sequence[int], mesh: Mesh
) -> dict[str, SharedModule]:
    """Return the shared modules of a model by global name; a collective call, which creates their groups.

    Args:
        owners: stages that hold each module, by global name; all ranks give the same.
        rank_of_stage: coordinate on the pp axis of each stage.
        mesh: of this rank.
    """
    shared = {}
    for name, stages in owners.items():
        ranks = tuple(dict.fromkeys(rank_of_stage[stage] for stage in stages))
        # Named as in Megatron for a tied head: embedding. All modules that the same ranks hold use one group.
        group = mesh.subgroup("pp", ranks, name.partition(".")[0])
        shared[name] = SharedModule(tuple(stages), ranks, group)
    return shared


def belongs_to(name: str, module: str) -> bool:
    """Return whether a parameter is a module's, or the shared parameter itself, given their global names."""
    return name == module or name.startswith(f"{module}.")


def rank_parameters(
    stages: Mapping[int, _Stage], shared: Mapping[str, SharedModule], pp_rank: int
) -> list[NamedParameter]:
    """Return the parameters of a rank's stages, each once and in the order of the model.

    Parameters that several stages hold become views of one tensor, that of the first.

    Args:
        stages: by global stage number, in the order of the model.
        shared: from locate_shared_modules.
        pp_rank: this rank's coordinate on the pp axis.
    """
    merged = merge_parameters(entry for stage in stages.values() for entry in stage.named_parameters_global())
    for parameter in merged:
        for alias in parameter.aliases:
            alias.data = parameter.param.data
    others = [name for name, module in shared.items() if module.ranks[0] != pp_rank]
    return [
        replace(parameter, owned=not any(belongs_to(parameter.name, name) for name in others)) for parameter in merged
    ]


def merge_parameters(parameters: Iterable[NamedParameter]) -> list[NamedParameter]:
    """Return the first entry of each name, with the aliases and the gradients per micro-batch of all its entries."""
    merged: dict[str, NamedParameter] = {}
    for parameter in parameters:
        if (first := merged.get(parameter.name)) is not None:
            others = {id(param): param for param in (*first.aliases, *parameter.uses) if param is not first.param}
            parameter = replace(first, aliases=tuple(others.values()), passes=first.passes + parameter.passes)
        merged[parameter.name] = parameter
    return list(merged.values())


def share_parameters(module: nn.Module, owner: nn.Module) -> None:
    """Make the parameters of a module views of those of another one of the same structure."""
    for own, other in zip(module.modules(), owner.modules(), strict=True):
        for name, param in list(other.named_parameters(recurse=False)):
            setattr(own, name, nn.Parameter(param.detach()))
