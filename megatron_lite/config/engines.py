"""Engine limits: settings that an engine cannot run, as data, and the rule that refuses them before a job starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lite.config.kernels import named_kernels
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


def pipeline(run: RunConfig) -> str:
    """Return the flag of several pipeline stages."""
    return given_if(run.parallel.pp > 1, f"--pipeline-model-parallel-size {run.parallel.pp}")


def other_schedule(run: RunConfig) -> str:
    """Return the flag of a schedule that reorders the work of a single pipeline stage."""
    schedule = run.parallel.pipeline_schedule
    return given_if(run.parallel.pp == 1 and schedule != "1f1b", f"--pipeline-schedule {schedule}")


def context_parallelism(run: RunConfig) -> str:
    """Return the flag of context parallelism."""
    return given_if(run.parallel.cp > 1, f"--context-parallel-size {run.parallel.cp}")


def fp8_products(run: RunConfig) -> str:
    """Return the flag of fp8 matrix products."""
    return given_if(run.fp8.format != "off", f"--fp8-format {run.fp8.format}")


def other_optimizer(run: RunConfig) -> str:
    """Return the flag of an optimizer other than AdamW and SGD."""
    return given_if(run.optimizer.kind not in ("adam", "sgd"), f"--optimizer {run.optimizer.kind}")


def weight_average(run: RunConfig) -> str:
    """Return the flag of a moving average of the weights."""
    return given_if(run.optimizer.ema_decay > 0, f"--ema-decay {run.optimizer.ema_decay:g}")


def compilation(run: RunConfig) -> str:
    """Return the flag of torch.compile."""
    return given_if(run.runtime.compile != "off", "--compile")


def weight_checks(run: RunConfig) -> str:
    """Return the flag of checks that replicas have equal weights."""
    interval = run.training.weight_check_interval
    return given_if(interval > 0, f"--check-weight-hash-across-dp-replicas-interval {interval}")


def scaled_gradients(run: RunConfig) -> str:
    """Return the entry of the DeepSpeed JSON that scales gradients before a reduce-scatter."""
    entries, zero = run.deepspeed.entries, run.deepspeed.zero
    found = {"prescale_gradients": False, "gradient_predivide_factor": 1.0}
    entry = next((entry for entry, default in found.items() if entries.get(entry, default) != default), "")
    scatters = run.deepspeed.stage >= 2 and zero.get("reduce_scatter", True)
    return given_if(bool(entry) and scatters, f"{entry} {json.dumps(entries.get(entry))} with reduce_scatter")


def accumulation_type(run: RunConfig) -> str:
    """Return the entry of the DeepSpeed JSON that asks for a type in which its ZeRO stage cannot add gradients."""
    found = run.deepspeed.entries.get("data_types", {}).get("grad_accum_dtype")
    dtype, stage = run.precision.dtype, run.deepspeed.stage
    return given_if(
        found not in (None, dtype) and (stage < 2 or found != "fp32"),
        f'data_types.grad_accum_dtype "{found}" with parameters in {dtype} and ZeRO stage {stage}',
    )


def odd_buckets(run: RunConfig) -> str:
    """Return the entry of the DeepSpeed JSON that gives buckets an odd size."""
    size = run.deepspeed.zero.get("allgather_bucket_size", 2)
    return given_if(run.deepspeed.stage in (1, 2) and size % 2 == 1, f"zero_optimization.allgather_bucket_size {size}")


def partial_offloading(run: RunConfig) -> str:
    """Return the entry of the DeepSpeed JSON that offloads a part of the optimizer's state."""
    ratio = run.deepspeed.zero.get("offload_optimizer", {}).get("ratio", 1)
    return given_if(ratio != 1, f"zero_optimization.offload_optimizer.ratio {ratio:g}")


def other_kernels(run: RunConfig) -> str:
    """Return the first flag that chooses kernels of another package."""
    if run.runtime.transformer_impl == "transformer_engine":
        return "--transformer-impl transformer_engine"
    return next((f"{flag} {kernel}" for kernel, flag in named_kernels(run).values()), "")


DEEPSPEED = (
    Limit(
        other_kernels,
        "Other packages' kernels are chosen for the native engine",
        "Remove the flag, or use --engine native",
    ),
    Limit(
        pipeline,
        "Its ZeRO stages reduce or partition gradients in each backward pass, of which a pipeline stage has several at "
        "once",
        "Use --pipeline-model-parallel-size 1 with a larger --tensor-model-parallel-size, or --engine native with ZeRO "
        "stage 1",
    ),
    Limit(
        other_schedule,
        "It has one pipeline stage, whose micro-batches run one after the other",
        "Remove --pipeline-schedule",
    ),
    Limit(
        context_parallelism,
        "It has not been tested with a sequence that is split over ranks",
        "Remove --context-parallel-size, or use --engine native with ZeRO stage 1",
    ),
    Limit(
        lambda run: given_if(
            run.deepspeed.stage == 0 and run.precision.dtype != "fp32", f"ZeRO stage 0 with --{run.precision.dtype}"
        ),
        "Without ZeRO, DeepSpeed adds gradients in half precision",
        "Use ZeRO stage 1 (--zero-stage 1), or --engine native",
    ),
    Limit(
        fp8_products,
        "The scales of fp8 products are state of the native engine",
        "Remove --fp8-format, or use --engine native with ZeRO stage 1",
    ),
    Limit(
        other_optimizer,
        "It updates flat partitions by torch's AdamW or SGD",
        "Use --optimizer adam or sgd, or --engine native with ZeRO stage 1",
    ),
    Limit(
        weight_average,
        "Its optimizer keeps no moving average of the weights",
        "Remove --ema-decay, or use --engine native with ZeRO stage 1",
    ),
    Limit(
        compilation,
        "It gathers parameters and reduces gradients in hooks of modules, which a compiled graph leaves out",
        "Remove --compile, or use --engine native with ZeRO stage 1",
    ),
    Limit(
        weight_checks,
        "Replicas that share partitions cannot repair each other",
        "Remove --check-weight-hash-across-dp-replicas-interval, or use --engine native with ZeRO stage 1",
    ),
    Limit(
        lambda run: given_if(run.metrics.log_num_zeros, "--log-num-zeros-in-grad"),
        "It frees gradients before they could be counted",
        "Remove --log-num-zeros-in-grad, or use --engine native with ZeRO stage 1",
    ),
    Limit(
        scaled_gradients,
        "ZeRO stages 2 and 3 divide gradients once, after the reduce-scatter",
        'Remove the entry from the JSON, or write "reduce_scatter": false in zero_optimization',
    ),
    Limit(
        accumulation_type,
        "ZeRO stages 2 and 3 add gradients in fp32 or in the type of the parameters, stages 0 and 1 in the latter",
        "Remove grad_accum_dtype from the JSON",
    ),
    Limit(
        odd_buckets,
        "ZeRO stages 1 and 2 gather an even number of elements at a time",
        "Write an even number, such as 500000000, or remove the entry",
    ),
    Limit(
        partial_offloading,
        "A part of the state is offloaded only with DeepSpeed's CPU Adam, which is compiled at the start",
        "Remove ratio from the JSON",
    ),
)

XLA = (
    Limit(
        pipeline,
        "XLA partitions one program over all devices, and pipeline stages are different programs",
        "Use --pipeline-model-parallel-size 1, and --tensor-model-parallel-size, --use-distributed-optimizer or "
        "--recompute-granularity full if memory is short",
    ),
    Limit(
        other_schedule,
        "XLA orders the products of a step itself, those of weight gradients too",
        "Remove --pipeline-schedule",
    ),
    Limit(
        context_parallelism,
        "It splits samples and heads over the devices, and attention reads complete sequences",
        "Use --context-parallel-size 1, and a larger --tensor-model-parallel-size with --sequence-parallel",
    ),
    Limit(
        lambda run: given_if(run.precision.dtype == "fp16", "--fp16"),
        "TPUs compute in bf16, and have no use for a loss scale",
        "Use --bf16",
    ),
    Limit(
        fp8_products,
        "The fp8 products are those of GPUs",
        "Remove --fp8-format",
    ),
    Limit(
        compilation,
        "XLA compiles every step, without torch.compile",
        "Remove --compile",
    ),
    Limit(
        other_optimizer,
        "It updates partitioned parameters by AdamW or SGD",
        "Use --optimizer adam or sgd",
    ),
    Limit(
        weight_average,
        "Its optimizer keeps no moving average of the weights",
        "Remove --ema-decay; `megatron-lite checkpoint average` averages saved weights",
    ),
    Limit(
        lambda run: given_if(run.data.reset_attention_mask, "--reset-attention-mask"),
        "Documents have other lengths in every micro-batch, so that every step would be compiled again",
        "Remove --reset-attention-mask",
    ),
    Limit(
        lambda run: given_if(run.runtime.attention != "auto", f"--attention-backend {run.runtime.attention}"),
        "The kernels of this flag are those of GPUs",
        "Remove --attention-backend",
    ),
    Limit(
        weight_checks,
        "XLA keeps the replicas, which cannot be read one by one",
        "Remove --check-weight-hash-across-dp-replicas-interval",
    ),
    Limit(
        lambda run: given_if(run.metrics.timing_log_level > 0, f"--timing-log-level {run.metrics.timing_log_level}"),
        "A step is one graph, whose parts have no times of their own",
        "Remove --timing-log-level, and trace the devices with torch_xla's profiler (docs/tpu.md)",
    ),
    Limit(
        lambda run: given_if(run.profile.on, "--profile"),
        "PyTorch's profiler does not see the devices",
        "Remove --profile, and trace the devices with torch_xla's profiler (docs/tpu.md)",
    ),
    Limit(
        lambda run: given_if(run.runtime.check_nodes, "--check-nodes"),
        "The checks measure GPUs",
        "Remove --check-nodes",
    ),
    Limit(
        other_kernels,
        "Other packages' kernels are those of GPUs",
        "Remove the flag",
    ),
)

LIMITS: Mapping[str, tuple[Limit, ...]] = {"native": (), "deepspeed": DEEPSPEED, "xla": XLA}
"""What each engine cannot run."""
NAMES = {"deepspeed": "The DeepSpeed engine", "xla": "The XLA engine (--device xla)"}


def engine_runs_the_config(config: RunConfig) -> Iterator[ConfigError]:
    """Refuse settings that the engine cannot run."""
    engine = config.runtime.engine
    for limit in LIMITS[engine]:
        if flag := limit.found(config):
            yield ConfigError(f"{NAMES[engine]} cannot run {flag}", rule=limit.reason, fix=limit.fix)


RULES = (engine_runs_the_config,)
