"""Engine limits: settings that an engine cannot run, as data, and the rule that refuses them before a job starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.run import RunConfig


@dataclass(frozen=True)
class Limit:
    """Setting that an engine cannot run.

    Attributes:
        found: returns the flag with its value if the config has the setting, else an empty string.
        reason: why the engine cannot run it.
        fix: what to do.
    """

    found: Callable[[RunConfig], str]
    reason: str
    fix: str


def given_if(applies: bool, flag: str) -> str:
    """Return the flag if the setting applies."""
    return flag if applies else ""


def _kernel_flag(run: RunConfig) -> str:
    runtime = run.runtime
    return (
        given_if(runtime.transformer_impl == "transformer_engine", "--transformer-impl transformer_engine")
        or given_if(runtime.norm_kernel not in ("auto", "torch"), f"--norm-kernel {runtime.norm_kernel}")
        or given_if(runtime.loss_kernel != "native", f"--cross-entropy-fusion-impl {runtime.loss_kernel}")
    )


KERNELS = Limit(
    _kernel_flag, "Other packages' kernels are chosen for the native engine", "Remove the flag, or use --engine native"
)

DEEPSPEED = (
    KERNELS,
    Limit(
        lambda run: given_if(run.parallel.pp > 1, f"--pipeline-model-parallel-size {run.parallel.pp}"),
        "Its ZeRO stages reduce or partition gradients in each backward pass, of which a pipeline stage has several at "
        "once",
        "Use --pipeline-model-parallel-size 1 with a larger --tensor-model-parallel-size, or --engine native with ZeRO "
        "stage 1",
    ),
    Limit(
        lambda run: given_if(
            run.parallel.pp == 1 and run.parallel.pipeline_schedule != "1f1b",
            f"--pipeline-schedule {run.parallel.pipeline_schedule}",
        ),
        "It has one pipeline stage, whose micro-batches run one after the other",
        "Remove --pipeline-schedule",
    ),
    Limit(
        lambda run: given_if(run.fp8.format != "off", f"--fp8-format {run.fp8.format}"),
        "The scales of fp8 products are state of the native engine",
        "Remove --fp8-format, or use --engine native with ZeRO stage 1",
    ),
    Limit(
        lambda run: given_if(run.optimizer.kind not in ("adam", "sgd"), f"--optimizer {run.optimizer.kind}"),
        "It updates flat partitions by torch's AdamW or SGD",
        "Use --optimizer adam or sgd, or --engine native with ZeRO stage 1",
    ),
    Limit(
        lambda run: given_if(run.optimizer.ema_decay > 0, f"--ema-decay {run.optimizer.ema_decay:g}"),
        "Its optimizer keeps no moving average of the weights",
        "Remove --ema-decay, or use --engine native with ZeRO stage 1",
    ),
    Limit(
        lambda run: given_if(run.runtime.compile != "off", f"--compile {run.runtime.compile}"),
        "It gathers parameters and reduces gradients in hooks of modules, which a compiled graph leaves out",
        "Remove --compile, or use --engine native with ZeRO stage 1",
    ),
    Limit(
        lambda run: given_if(
            run.training.weight_check_interval > 0,
            f"--check-weight-hash-across-dp-replicas-interval {run.training.weight_check_interval}",
        ),
        "Replicas that share partitions cannot repair each other",
        "Remove --check-weight-hash-across-dp-replicas-interval, or use --engine native with ZeRO stage 1",
    ),
    Limit(
        lambda run: given_if(run.metrics.log_num_zeros, "--log-num-zeros-in-grad"),
        "It frees gradients before they could be counted",
        "Remove --log-num-zeros-in-grad, or use --engine native with ZeRO stage 1",
    ),
)

LIMITS: Mapping[str, tuple[Limit, ...]] = {"native": (), "deepspeed": DEEPSPEED}
"""What each engine cannot run."""
NAMES = {"deepspeed": "The DeepSpeed engine"}


def engine_runs_the_config(config: RunConfig) -> Iterator[ConfigError]:
    """Refuse settings that the engine cannot run."""
    engine = config.runtime.engine
    for limit in LIMITS[engine]:
        if flag := limit.found(config):
            yield ConfigError(f"{NAMES[engine]} cannot run {flag}", rule=limit.reason, fix=limit.fix)


RULES = (engine_runs_the_config,)
