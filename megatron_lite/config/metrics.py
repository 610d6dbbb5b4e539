"""Logging config: log interval, TensorBoard directory, metrics options."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config.flag import Flag, option

LAST_RANK_WRITES = "only the last rank writes it, and it may lie on that rank's node"


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Console line, TensorBoard and metrics.jsonl."""

    log_interval: int = option(100, Flag("--log-interval", "Iterations between log lines.", least=1))
    tensorboard_dir: str = option(
        "", Flag("--tensorboard-dir", "Folder of the TensorBoard files.", metavar="FOLDER"), may_differ=LAST_RANK_WRITES
    )
    tensorboard_log_interval: int = option(
        1, Flag("--tensorboard-log-interval", "Iterations between TensorBoard points.", least=1)
    )
    tensorboard_queue_size: int = option(
        1000, Flag("--tensorboard-queue-size", "Points held before they are written.", least=1, most=10**9)
    )
    log_timers: bool = option(False, Flag("--log-timers-to-tensorboard", "Timers in TensorBoard.", sets=True))
    log_validation_ppl: bool = option(
        False, Flag("--log-validation-ppl-to-tensorboard", "Validation perplexity in TensorBoard.", sets=True)
    )
    log_memory: bool = option(False, Flag("--log-memory-to-tensorboard", "Memory in TensorBoard.", sets=True))
    log_world_size: bool = option(
        False, Flag("--log-world-size-to-tensorboard", "World size in TensorBoard.", sets=True)
    )
    log_learning_rate: bool = option(
        True,
        Flag(
            "--no-log-learning-rate-to-tensorboard",
            "No learning rate in TensorBoard.",
            sets=False,
            aliases=("--no-log-learnig-rate-to-tensorboard",),
        ),
    )
    log_loss_scale: bool = option(
        True, Flag("--no-log-loss-scale-to-tensorboard", "No loss scale in TensorBoard.", sets=False)
    )
    log_params_norm: bool = option(False, Flag("--log-params-norm", "Norm of the parameters in the log.", sets=True))
    log_num_zeros: bool = option(
        False, Flag("--log-num-zeros-in-grad", "Number of zeros in the gradient in the log.", sets=True)
    )
    timing_log_level: int = option(0, Flag("--timing-log-level", "Detail of the timers: 0, 1 or 2."))
    metrics_file: str = option(
        "",
        Flag("--metrics-file", "Path of metrics.jsonl (in the folder --save if not given).", metavar="FILE"),
        may_differ=LAST_RANK_WRITES,
    )
    progress_bar: bool = option(
        True,
        Flag("--no-progress-bar", "Plain lines instead of a live bar, also on a terminal.", sets=False),
        may_differ="it concerns the terminal of the last rank only",
    )
