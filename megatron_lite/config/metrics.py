"""Logging config: log interval, TensorBoard directory, metrics options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lite.config.flag import Flag, option
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.run import RunConfig

LAST_RANK_WRITES = "only the last rank writes it, and it may lie on that rank's node"


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Console line, metrics.jsonl, TensorBoard, Weights & Biases, CSV files and CodeCarbon."""

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
    wandb_project: str = option(
        "",
        Flag("--wandb-project", "Project of Weights & Biases, to which the run is logged.", metavar="NAME"),
        may_differ=LAST_RANK_WRITES,
    )
    wandb_exp_name: str = option(
        "",
        Flag("--wandb-exp-name", "Name of the run there (of the folder --save if not given).", metavar="NAME"),
        may_differ=LAST_RANK_WRITES,
    )
    wandb_save_dir: str = option(
        "",
        Flag("--wandb-save-dir", "Folder of the local files wandb/ (--save if not given).", metavar="FOLDER"),
        may_differ=LAST_RANK_WRITES,
    )
    wandb_entity: str = option(
        "", Flag("--wandb-entity", "User or team of the project.", metavar="NAME"), may_differ=LAST_RANK_WRITES
    )
    csv_dir: str = option(
        "",
        Flag("--csv-dir", "Folder of iterations.csv, validations.csv and saves.csv.", metavar="FOLDER"),
        may_differ=LAST_RANK_WRITES,
    )
    codecarbon_dir: str = option(
        "",
        Flag(
            "--codecarbon-dir",
            "Folder of CodeCarbon's emissions-RANK.csv: energy and emissions of each node.",
            metavar="FOLDER",
        ),
        may_differ="each node writes a file of its own",
    )
    codecarbon_country: str = option(
        "FRA", Flag("--codecarbon-country", "Country of the cluster, three letters (ISO 3166-1).", metavar="ISO")
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


def tools_are_complete(config: RunConfig) -> Iterator[ConfigError]:
    """Check the flags of Weights & Biases and CodeCarbon."""
    metrics = config.metrics
    details = {
        "--wandb-exp-name": metrics.wandb_exp_name,
        "--wandb-save-dir": metrics.wandb_save_dir,
        "--wandb-entity": metrics.wandb_entity,
    }
    if not metrics.wandb_project and (given := [f"{flag} {value}" for flag, value in details.items() if value]):
        yield ConfigError(
            f"{' and '.join(given)} without --wandb-project: the run would not be logged to Weights & Biases",
            fix=f"Add --wandb-project NAME, or remove {' and '.join(text.split()[0] for text in given)}",
        )
    country = metrics.codecarbon_country
    if not (len(country) == 3 and country.isascii() and country.isalpha() and country.isupper()):
        yield ConfigError(
            f"--codecarbon-country {country} is not a country code of three capital letters",
            fix="Give the code of ISO 3166-1 alpha-3, for example --codecarbon-country FRA or DEU",
        )
    elif country != MetricsConfig.codecarbon_country and not metrics.codecarbon_dir:
        yield ConfigError(
            f"--codecarbon-country {country} without --codecarbon-dir: the energy would not be measured",
            fix="Add --codecarbon-dir DIR, or remove --codecarbon-country",
        )


RULES = (tools_are_complete,)
