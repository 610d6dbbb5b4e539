"""Logging config: log interval, TensorBoard directory, metrics options."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Console line, TensorBoard and metrics.jsonl."""

    log_interval: int = 100
    tensorboard_dir: str = ""
    tensorboard_log_interval: int = 1
    tensorboard_queue_size: int = 1000
    log_timers: bool = False
    log_validation_ppl: bool = False
    log_memory: bool = False
    log_world_size: bool = False
    log_learning_rate: bool = True
    log_loss_scale: bool = True
    log_params_norm: bool = False
    log_num_zeros: bool = False
    timing_log_level: int = 0
    metrics_file: str = ""
    """metrics.jsonl's path; empty: in --save's folder, or no file without one."""
    progress_bar: bool = True
    """A live bar where stdout is a terminal; plain lines otherwise."""
