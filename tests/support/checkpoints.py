"""Fixtures for checkpoint tests: small tensors, saves of one rank, forked gloo ranks."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.backend.group import Group, LocalGroup, new_process_group
from megatron_lite.checkpoint.reading import CheckpointReader
from megatron_lite.checkpoint.save import save_checkpoint
from megatron_lite.checkpoint.writing import SaveReport, SaveRequest
from megatron_lite.parallel.tensors import GlobalTensor, Piece
from megatron_lite.runs.manifest import Provenance
from megatron_lite.runs.retention import Retention


class Kit:
    """A world of one rank, and tensors to save in it."""

    world = LocalGroup("world")

    def held(self, tensors: Mapping[str, Tensor]) -> list[GlobalTensor]:
        """Return global tensors of which this rank has all elements."""
        return [GlobalTensor(n, tuple(x.shape), x.dtype, [Piece((0,) * x.dim(), x)]) for n, x in tensors.items()]

    def zeros_like(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return {
            "embedding.word_embeddings.weight": torch.randn(101, 8, generator=draw),
            "decoder.layers.0.mlp.fc1.weight": torch.randn(2, 12, 8, generator=draw),
            "decoder.final_norm.bias": torch.randn(8, generator=draw),
            "optimizer.step": torch.tensor(3.0),
            "optimizer.exp_avg.decoder.final_norm.bias": torch.randn(8, generator=draw),
        }

    def save(
        self, root: Path, iteration: int, tensors: Mapping[str, Tensor] | None = None, keep_last: int = 0, **options
    ) -> SaveReport:
        """Save the given tensors, or some that depend on the iteration."""
        held = self.held(self.tensors(iteration) if tensors is None else tensors)
        options = {"retention": Retention(keep_last), **options}
        return save_checkpoint(
            SaveRequest(root, iteration, {"iteration": iteration}, Provenance(), **options), held, self.world
        )


def read_tensor(path: Path, name: str) -> Tensor:
    """Return a tensor of a checkpoint."""
    reader = CheckpointReader(path)
    return reader.read(name, reader.tensors[name].full)


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()


def _rank(rank: int, size: int, store: str, function: Callable[[Group], None]) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        function(new_process_group("world", (tuple(range(size)),), rank))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


@pytest.fixture
def on_ranks(tmp_path_factory):
    """Run function(world) on that many forked gloo ranks, and fail if it fails on any."""

    def run(size: int, function: Callable[[Group], None]) -> None:
        store = str(tmp_path_factory.mktemp("store") / "store")
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=_rank, args=(rank, size, store, function)) for rank in range(size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(240)
        assert [rank.exitcode for rank in ranks] == [0] * size

    return run
