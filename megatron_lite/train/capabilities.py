"""Capability check: refuses a configuration that the device or engine cannot run."""

from __future__ import annotations

from megatron_lite.backend.base import Backend
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError


def check_capabilities(config: RunConfig, backend: Backend) -> None:
    """Refuses a run that its backend or engine cannot do.

    Raises:
        ConfigError: the first thing that it cannot do.
    """
    able, precision = backend.capabilities(), config.precision
    if precision.dtype not in able.dtypes:
        raise ConfigError(
            "The device must compute in the precision of the run",
            found=f"--{precision.dtype} on {backend.device_name()}, which can do {', '.join(sorted(able.dtypes))}",
            fix="Use another precision or another --device",
        )
    if config.runtime.compile and not able.compile:
        raise ConfigError(
            "--compile needs a device that torch.compile supports",
            found=f"--compile on {backend.device_name()}",
            fix="Leave --compile out",
        )
    if able.max_world is not None and config.parallel.world_size > able.max_world:
        raise ConfigError(
            "The backend must be able to span the job",
            found=f"{config.parallel.world_size} ranks on {backend.name}, which spans {able.max_world}",
            fix="Start fewer ranks or use another --device",
        )
