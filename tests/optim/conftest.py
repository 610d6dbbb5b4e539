"""Fixtures: optimizers over small modules, on one process and on gloo ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_lite.backend.base import Backend
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.metrics import MetricsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import OptimizerConfig, PrecisionConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.optim.optimizer import Optimizer
from megatron_lite.parallel.buffers import ParameterBuffers
from megatron_lite.parallel.mesh import Mesh, build_mesh
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.rectangle import Rectangle

CPU = RuntimeConfig(device="cpu", num_threads=1)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


class Kit:
    """Builder of meshes, named parameters, configs and optimizers."""

    def mesh(self) -> Mesh:
        """Return the mesh of a single process."""
        return build_mesh(select_backend(CPU, ParallelConfig(), Launch()), ParallelConfig())

    def named(self, module: nn.Module, prefix: str = "") -> list[NamedParameter]:
        """Return the named parameters of a module on a rank that holds all of them."""
        return [
            NamedParameter(prefix + name, param, tuple(param.shape), None, Rectangle.full(param.shape))
            for name, param in module.named_parameters()
        ]

    def config(self, **parts: Any) -> RunConfig:
        """Return a run config with the given fields of OptimizerConfig, PrecisionConfig and MetricsConfig."""
        kinds = {"optimizer": OptimizerConfig, "precision": PrecisionConfig, "metrics": MetricsConfig}
        chosen = {
            part: replace(kind(), **{name: parts.pop(name) for name in list(parts) if name in kind.__annotations__})
            for part, kind in kinds.items()
        }
        assert not parts, parts
        model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        return RunConfig(model=model, batch=BatchConfig(seq_length=8, micro_batch_size=1), **chosen)

    def build(self, module: nn.Module, mesh: Mesh | None = None, buffers: dict[str, Any] | None = None, **parts: Any):
        """Return buffers and optimizer of a module."""
        mesh = mesh or self.mesh()
        prefix = "decoder.layers." if parts.get("kind") == "muon" else ""  # so that all matrices are Muon's
        held = ParameterBuffers(self.named(module, prefix), dp=mesh.dp, tp=mesh.tp, **(buffers or {}))
        return held, Optimizer(self.config(**parts), held, mesh)


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()


@pytest.fixture
def on_meshes(on_ranks):
    """Call function(mesh, *args) on gloo ranks with a layout; return the result of each rank (Python or numpy)."""

    def run(parallel: ParallelConfig, function: Callable[..., Any], *args: Any) -> list[Any]:
        return on_ranks(parallel.world_size, _on_mesh, parallel, function, *args)

    return run


def _on_mesh(backend: Backend, parallel: ParallelConfig, function: Callable[..., Any], *args: Any) -> Any:
    return function(build_mesh(backend, parallel), *args)
