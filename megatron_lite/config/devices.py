"""Device limits: settings that a type of device (MPS, Intel XPU) cannot run, and the rule that refuses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from megatron_lite.config.engines import Limit, compilation, fp8_products, given_if
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.run import RunConfig


FP8 = Limit(
    fp8_products,
    "It has no fp8 matrix products",
    "Remove --fp8-format",
)
FLOAT64 = Limit(
    lambda run: given_if(run.optimizer.kind in ("adafactor", "adamw8bit"), f"--optimizer {run.optimizer.kind}"),
    "It has no float64, in which this optimizer computes",
    "Use --optimizer adam, or --device cpu",
)

XPU = (
    FP8,
    Limit(
        lambda run: given_if(
            run.runtime.attention in ("flash", "fused"), f"--attention-backend {run.runtime.attention}"
        ),
        "The flag names a kernel of CUDA devices",
        "Use --attention-backend auto",
    ),
)
MPS = (
    Limit(
        lambda run: given_if(run.parallel.world_size > 1, f"{run.parallel.world_size:,} ranks"),
        "PyTorch has no communication between Apple GPUs",
        "Use parallel sizes of 1 and start one rank, or use --device cpu",
    ),
    Limit(
        compilation,
        "Compiled training has not been tested on Apple GPUs",
        "Remove --compile",
    ),
    FP8,
    FLOAT64,
)

LIMITS: Mapping[str, tuple[Limit, ...]] = {"xpu": XPU, "mps": MPS}
"""What devices of a kind cannot run."""


def device_errors(device: str, config: RunConfig) -> Iterator[ConfigError]:
    """Yield an error for each setting of a run that a kind of device cannot run."""
    for limit in LIMITS.get(device, ()):
        if flag := limit.found(config):
            yield ConfigError(f"--device {device} cannot run {flag}", rule=limit.reason, fix=limit.fix)


def device_runs_the_config(config: RunConfig) -> Iterator[ConfigError]:
    """Refuse settings that the given kind of device cannot run; that of --device auto is found by the job."""
    yield from device_errors(config.runtime.device, config)


RULES = (device_runs_the_config,)
