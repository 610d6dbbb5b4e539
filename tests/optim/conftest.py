"""Optimizers over small modules, on one process and on forked gloo ranks."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.metrics import MetricsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import OptimizerConfig, PrecisionConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.optim.optimizer import build_optimizer
from megatron_lite.parallel.buffers import ParameterBuffers
from megatron_lite.parallel.mesh import Mesh, build_mesh
from megatron_lite.parallel.parameters import NamedParameter

CPU = RuntimeConfig(device="cpu", num_threads=1)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


class Kit:
    """Makes the parts under test."""

    def mesh(self, parallel: ParallelConfig | None = None, launch: Launch | None = None) -> Mesh:
        parallel = parallel or ParallelConfig()
        return build_mesh(select_backend(CPU, parallel, launch or Launch()), parallel)

    def named(self, module: nn.Module) -> list[NamedParameter]:
        """The module's parameters as one rank's that holds all of them."""
        return [
            NamedParameter(name, param, tuple(param.shape), None, tuple(param.shape), (0,) * param.dim())
            for name, param in module.named_parameters()
        ]

    def config(self, **parts: Any) -> RunConfig:
        """A run with only the given fields of OptimizerConfig, PrecisionConfig, MetricsConfig set."""
        kinds = {"optimizer": OptimizerConfig, "precision": PrecisionConfig, "metrics": MetricsConfig}
        chosen = {
            part: replace(kind(), **{name: parts.pop(name) for name in list(parts) if name in kind.__annotations__})
            for part, kind in kinds.items()
        }
        assert not parts, parts
        model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        return RunConfig(model=model, batch=BatchConfig(seq_length=8, micro_batch_size=1), **chosen)

    def build(self, module: nn.Module, mesh: Mesh | None = None, buffers: dict[str, Any] | None = None, **parts: Any):
        """Buffers and optimizer over a module."""
        mesh = mesh or self.mesh()
        held = ParameterBuffers(self.named(module), dp=mesh.dp, tp=mesh.tp, **(buffers or {}))
        return held, build_optimizer(self.config(**parts), held, mesh)


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()


def _rank(rank: int, parallel: ParallelConfig, store: str, function: Callable[[Mesh], Any], results: Any) -> None:
    try:
        torch.set_num_threads(1)
        world = parallel.world_size
        launch = Launch(rank=rank, world_size=world, local_rank=rank, local_world_size=world, init_method=store)
        mesh = Kit().mesh(parallel, launch)
        results.put((rank, function(mesh)))
        results.close()
        results.join_thread()
        mesh.world.barrier()
        mesh.backend.shutdown()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


@pytest.fixture
def on_ranks(tmp_path_factory):
    """Runs function(mesh) on forked gloo ranks and returns their results (plain Python or numpy), in order."""

    def run(parallel: ParallelConfig, function: Callable[[Mesh], Any]) -> list[Any]:
        store = f"file://{tmp_path_factory.mktemp('store') / 'store'}"
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        ranks = [
            context.Process(target=_rank, args=(rank, parallel, store, function, results))
            for rank in range(parallel.world_size)
        ]
        for process in ranks:
            process.start()
        try:
            gathered = dict(_next_result(results, ranks) for _ in ranks)
            for process in ranks:
                process.join(timeout=30)
            assert all(process.exitcode == 0 for process in ranks)
            return [gathered[rank] for rank in range(len(ranks))]
        finally:
            for process in ranks:
                process.kill()

    return run


def _next_result(results: Any, ranks: list[Any]) -> tuple[int, Any]:
    for _ in range(120):
        with contextlib.suppress(queue.Empty):
            return results.get(timeout=0.5)
        assert not any(process.exitcode for process in ranks), "a rank failed: see its traceback"
    raise AssertionError("the ranks gave no result within 60 s")
