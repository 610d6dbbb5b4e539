"""JSON record of a plan: everything that `megatron-lite plan` computes, for --json and for its tables."""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from megatron_lite.cli.plan_remedies import remedies
from megatron_lite.config.arguments import ParsedRun
from megatron_lite.config.files import missing_files
from megatron_lite.config.layout import axis_sizes, describe_sizes
from megatron_lite.config.run import RunConfig
from megatron_lite.data.serving.epochs import with_epochs
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.formatting import format_size
from megatron_lite.planner.advice import advise, device_advice
from megatron_lite.planner.calibration import Calibration
from megatron_lite.planner.compute import peak_of
from megatron_lite.planner.hardware import Hardware
from megatron_lite.planner.job import Assumptions, JobPlan, plan_job
from megatron_lite.planner.memory import rank_memory
from megatron_lite.planner.nodes import even_nodes, node_counts
from megatron_lite.planner.summary import model_size
from megatron_lite.runs.catalog import latest_iteration
from megatron_lite.schedules.batch_size import global_batch_size
from megatron_lite.schedules.length import last_iteration
from megatron_lite.tokenizer.vocabulary import fill_vocabulary

FORMULAS = {
    "model_flops": "forward and backward of the matrix products, attention over the full square, no recomputation "
    "(Chowdhery et al. 2022, arXiv:2204.02311, appendix B); MFU counts these",
    "hardware_flops": "the same with recomputed layers (Korthikanti et al. 2022, arXiv:2205.05198); HFU counts these",
    "classic": "8 B P / (n T): B tokens, P parameters, n devices, T hardware FLOP/s of a device (Narayanan et al. "
    "2021, arXiv:2104.04473, eq. 4)",
    "goodput": "expected run time of Daly 2006, eq. 13; its optimal save interval, eq. 37 (Young 1974: sqrt(2 d M))",
}
MAX_NODES = 4096
"""Node counts up to which those are listed that divide every batch of the ramp-up."""


def plan_record(
    parsed: ParsedRun, machine: Hardware, assumptions: Assumptions, budget: float, calibration: Calibration | None
) -> tuple[dict[str, Any], bool]:
    """Return the plan, and whether the run does not fit, cannot finish or exceeds the budget.

    Args:
        parsed: the training command.
        machine: device, node size and efficiencies.
        assumptions: what the command does not say.
        budget: allowed device hours; 0: no limit.
        calibration: of the machine; None: it is as the data sheet says.

    Raises:
        ConfigError: the length of the run is unknown.
    """
    config, vocabulary = fill_vocabulary(_counted(parsed.config))
    _check_length(config)
    job = plan_job(config, machine, assumptions)
    memory = _memory(config, machine)
    done = min(_done(config), job.iterations)
    over_budget = bool(budget) and job.cost.device_hours > budget
    of_device = device_advice(config, machine, is_calibrated=calibration is not None)
    warnings = [str(advice) for advice in (*of_device, *advise(config, machine, job))]
    even = even_nodes(config, machine, min(MAX_NODES, 4 * job.nodes))
    if machine.device.memory and not memory["fits"]:
        warnings.insert(0, _does_not_fit(config, memory, machine))
    if over_budget:
        warnings.insert(
            0,
            f"{job.cost.device_hours:,.0f} GPU hours exceed --budget-hours {budget:,.0f}. Use a shorter run, or a "
            "faster layout",
        )
    record = {
        "answer": {
            "days": job.total_seconds / 86400.0,
            "done_iterations": done,
            "remaining_days": job.seconds_after(done) / 86400.0,
            "fits": memory["fits"],
            "can_finish": job.can_finish,
            "device_hours": job.cost.device_hours,
            "within_budget": None if not budget else not over_budget,
        },
        "warnings": [*warnings, *parsed.warnings],
        "notes": [*parsed.notes, *map(str, missing_files(config, parsed.missing, parsed.spellings))],
        "model": {**asdict(model_size(config)), "vocabulary_from": vocabulary},
        "layout": {"text": describe_sizes(axis_sizes(config.parallel)), "world_size": config.parallel.world_size}
        | axis_sizes(config.parallel),
        "machine": asdict(machine) | {"nodes": job.nodes},
        "assumptions": asdict(assumptions)
        | {
            "write_rate": job.write_rate,
            "job_seconds": job.job_seconds or None,
            "watts": assumptions.watts or machine.device.watts,
            "carbon": assumptions.carbon or None,
            "price": assumptions.price or None,
        },
        "time": _time(job, machine, config),
        "memory": memory,
        "disk": _disk(job),
        "goodput": {
            name: _finite(value)
            for name, value in [*asdict(job.goodput).items(), ("between_saves_seconds", job.between_saves)]
        },
        "cost": asdict(job.cost),
        "nodes": [asdict(count) for count in node_counts(config, machine, even)],
        "nodes_without_idle_replicas": even,
        "calibration": None if calibration is None else _calibration(calibration),
        "formulas": FORMULAS,
    }
    return record, over_budget or not memory["fits"] or not job.can_finish


def _counted(config: RunConfig) -> RunConfig:
    """Return the config with --epochs as samples, if the data can be opened on this machine."""
    try:
        return with_epochs(config)
    except DataError:
        return config


def _done(config: RunConfig) -> int:
    """Return the iterations of the checkpoint from which the run would resume; 0: there is none on this machine."""
    options = config.checkpoint
    if not options.load or options.finetune or options.reset_progress:
        return 0
    return options.load_iteration or latest_iteration(Path(options.load)) or 0


def _check_length(config: RunConfig) -> None:
    if last_iteration(config) >= 1:
        return
    if config.tuning.epochs:
        raise ConfigError(
            f"The number of samples of --epochs {config.tuning.epochs} is unknown, since the data cannot be opened "
            "here",
            fix="Give --train-samples N instead of --epochs to plan it",
        )
    samples, batch = config.training.train_samples, global_batch_size(config.batch, 0, config.parallel.dp)
    raise ConfigError(
        f"The run has no iteration: --train-samples {samples} is less than a global batch of {batch}",
        fix=f"Give --train-samples {batch} or more, or a smaller --global-batch-size",
    )


def _memory(config: RunConfig, machine: Hardware) -> dict[str, Any]:
    ranks = rank_memory(config)
    fullest, available = max(rank.total for rank in ranks), machine.device.available
    return {
        "device_bytes": machine.device.memory,
        "available_bytes": available,
        "fullest_bytes": fullest,
        "fits": not available or fullest <= available,
        "ranks": [asdict(rank) | {"total": rank.total} for rank in ranks],
    }


def _does_not_fit(config: RunConfig, memory: dict[str, Any], machine: Hardware) -> str:
    fullest = max(memory["ranks"], key=lambda rank: rank["total"])
    problem = (
        f"The run does not fit: pipeline rank {fullest['pp_rank']} needs {format_size(fullest['total'])}, and "
        f"{machine.device.name} has {format_size(memory['available_bytes'])} beside driver and libraries"
    )
    found = remedies(config, memory["available_bytes"], machine.per_node)
    if not found:
        return f"{problem}. Use more GPUs, a device with more memory, or a smaller model: no small change makes it fit"
    return f"{problem}. It fits with " + ", or with ".join(f"{flags} ({format_size(size)})" for flags, size in found)


def _time(job: JobPlan, machine: Hardware, config: RunConfig) -> dict[str, Any]:
    dtype, peak = peak_of(config, machine)
    return {
        "iterations": job.iterations,
        "samples": job.samples,
        "tokens": job.tokens,
        "seconds": job.seconds,
        "total_seconds": job.total_seconds,
        "classic_seconds": job.classic_seconds,
        "jobs": job.jobs,
        "tokens_per_second": job.tokens_per_second,
        "model_tflops_per_device": job.model_flops_per_second / 1e12,
        "hardware_tflops_per_device": job.hardware_flops_per_second / 1e12,
        "mfu": job.model_flops_per_second / peak,
        "hfu": job.hardware_flops_per_second / peak,
        "peak_tflops": peak / 1e12,
        "peak_dtype": dtype,
        "stages": [
            {
                "first_iteration": stage.first_iteration,
                "last_iteration": stage.last_iteration,
                "global_batch": stage.global_batch,
                "seq_length": stage.seq_length,
                "skipped": stage.skipped,
                "idle": stage.idle,
                "microbatches": stage.step.microbatches,
                "step_seconds": stage.step.total,
                "parts": stage.step.parts,
                "tokens_per_second": stage.step.tokens / stage.step.total,
                "model_tflops_per_device": stage.step.model_flops_per_second / 1e12,
                "hardware_tflops_per_device": stage.step.hardware_flops_per_second / 1e12,
                "seconds": stage.seconds,
            }
            for stage in job.stages
        ],
    }


def _disk(job: JobPlan) -> dict[str, Any]:
    days = job.total_seconds / 86400.0
    return asdict(job.storage) | {
        "write_rate": job.write_rate,
        "save_seconds": job.save_seconds,
        "blocking_seconds": job.blocking_seconds,
        "share_of_interval": job.blocking_seconds / job.between_saves,
        "written_bytes_per_day": job.storage.written / days if days else 0.0,
    }


def _calibration(calibration: Calibration) -> dict[str, Any]:
    return {
        "iterations": calibration.iterations,
        "measured_seconds": calibration.measured,
        "predicted_before": calibration.before,
        "predicted_after": calibration.after,
        "efficiency": asdict(calibration.machine.efficiency),
    }


def _finite(number: float) -> float | None:
    return number if isfinite(number) else None
