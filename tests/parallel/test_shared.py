"""Tests of the map of shared modules: one tensor per rank, owner, gradients per micro-batch, groups."""

import pytest
import torch
from torch import nn

from megatron_lite.backend.fake import FakeBackend
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.parameters import replicated_parameter
from megatron_lite.parallel.shared import locate_shared_modules, rank_parameters, share_parameters

# A block that the stages 0, 2 and 4 of six share; two stages per pipeline rank, interleaved.
OWNERS, RANK_OF_STAGE = {"block": (0, 2, 4)}, (0, 1, 2, 0, 1, 2)
PARALLEL = ParallelConfig(world_size=6, pp=3)


class Stage(nn.Module):
    """A stage with a weight of its own, and with the shared block if it is one of the block's stages."""

    def __init__(self, number):
        super().__init__()
        self.number = number
        self.own = nn.Linear(2, 2, bias=False)
        self.block = nn.Linear(2, 2, bias=False) if number in OWNERS["block"] else None

    def named_parameters_global(self):
        found = [replicated_parameter(f"own.{self.number}", self.own.weight, sequence_parallel=False)]
        if self.block is not None:
            found.append(replicated_parameter("block.weight", self.block.weight, sequence_parallel=False))
        return found


def mesh_of(rank):
    return build_mesh(FakeBackend(rank, 6), PARALLEL)


@pytest.mark.parametrize("rank", range(6))
def test_gradients_are_summed_over_the_pipeline_ranks_of_the_stages(rank):
    mesh = mesh_of(rank)
    entry = locate_shared_modules(OWNERS, RANK_OF_STAGE, mesh)["block"]
    assert (entry.stages, entry.ranks) == ((0, 2, 4), (0, 2, 1))
    assert entry.group.ranks == ((0, 2, 4) if rank % 2 == 0 else (1, 3, 5))
    two_of_three = locate_shared_modules({"tied": (0, 5)}, RANK_OF_STAGE, mesh)["tied"].group
    expected = {0: (0, 4), 1: (1, 5), 2: (2,), 3: (3,), 4: (0, 4), 5: (1, 5)}
    assert two_of_three.ranks == expected[rank]


@pytest.mark.parametrize("pp_rank", range(3))
def test_the_first_rank_owns_the_parameter(pp_rank):
    shared = locate_shared_modules(OWNERS, RANK_OF_STAGE, mesh_of(2 * pp_rank))
    stages = {number: Stage(number) for number, rank in enumerate(RANK_OF_STAGE) if rank == pp_rank}
    parameters = {parameter.name: parameter for parameter in rank_parameters(stages, shared, pp_rank)}
    assert parameters["block.weight"].owned is (pp_rank == 0)
    assert all(p.owned and p.passes == 1 for name, p in parameters.items() if name.startswith("own"))


def test_stages_of_one_rank_use_one_tensor():
    shared = locate_shared_modules({"block": (0, 2)}, (0, 0, 0), build_mesh(FakeBackend(0, 1), ParallelConfig()))
    stages = {number: Stage(number) for number in range(3)}
    found = rank_parameters(stages, shared, 0)
    assert [parameter.name for parameter in found] == ["own.0", "block.weight", "own.1", "own.2"]
    first, second = stages[0].block.weight, stages[2].block.weight
    assert found[1].param is first and found[1].aliases == (second,) and found[1].uses == (first, second)
    assert first.data_ptr() == second.data_ptr()
    assert (found[1].passes, found[1].owned) == (2, True)


def test_a_module_that_shares_keeps_parameters_of_its_own_with_the_same_values():
    owner, module = Stage(0), Stage(0)
    share_parameters(module, owner)
    with torch.no_grad():
        owner.block.weight.fill_(3)
    assert module.block.weight.eq(3).all() and module.block.weight is not owner.block.weight
    sum(stage.block(torch.ones(1, 2)).sum() for stage in (owner, module, module)).backward()
    assert owner.block.weight.grad.eq(1).all() and module.block.weight.grad.eq(2).all()
