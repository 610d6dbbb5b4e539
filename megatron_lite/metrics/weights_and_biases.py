"""Weights & Biases sink with Megatron-LM's tags; a resumed run continues the same W&B run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_lite.config.metrics import MetricsConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.metrics.report import IterationReport, RunFacts, ValidationReport
from megatron_lite.metrics.scalars import is_logged, machine_scalars, training_scalars, validation_scalars
from megatron_lite.metrics.sink import Sink, missing_library
from megatron_lite.runs.atomic import replace_file

RUN_ID_NAME = "wandb_run_id.txt"
"""In the --save folder."""
INIT_SECONDS = 60
"""Longest wait for the server at the start, during which all ranks wait."""


def import_wandb() -> Any:
    """Return the package wandb.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise missing_library("--wandb-project", "wandb", error) from error
    return wandb


class WandbSink(Sink):
    """Logs scalars by iteration.

    W&B's own step only grows, while a rollback repeats iterations: the iteration is therefore a logged value, and the
    horizontal axis of all others.

    Args:
        wandb: the package, or an object with its init and Settings.
        config: metrics options.
        save: the --save folder; empty: there is none, and every start is a W&B run of its own.
    """

    def __init__(self, wandb: Any, config: MetricsConfig, save: str) -> None:
        self._wandb = wandb
        self._config = config
        self._save = Path(save) if save else None
        self._run: Any = None
        self._world_size = 1

    def start(self, config: RunConfig, facts: RunFacts) -> None:
        """Begin or continue the W&B run."""
        options = self._config
        folder = Path(options.wandb_save_dir or self._save or ".")
        folder.mkdir(parents=True, exist_ok=True)
        self._world_size = facts.world_size
        run_id = self._stored_id() if facts.start_iteration and config.checkpoint.in_one_folder else None
        self._run = self._wandb.init(
            project=options.wandb_project,
            entity=options.wandb_entity or None,
            name=options.wandb_exp_name or (self._save.resolve().name if self._save else None),
            dir=str(folder),
            id=run_id,
            resume="allow",
            config=dataclasses.asdict(config) | {"facts": dataclasses.asdict(facts)},
            allow_val_change=True,
            # Without capturing stdout, which the progress bar writes to.
            settings=self._wandb.Settings(console="off", init_timeout=INIT_SECONDS),
        )
        if self._save is not None and self._run.id != run_id:
            self._save.mkdir(parents=True, exist_ok=True)
            replace_file(self._save / RUN_ID_NAME, f"{self._run.id}\n".encode())
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def iteration(self, report: IterationReport) -> None:
        """Log the iteration's scalars if --tensorboard-log-interval divides it."""
        if is_logged(self._config, report):
            scalars = (
                *training_scalars(self._config, report, self._world_size),
                *machine_scalars(self._config, report),
            )
            self._log(report, scalars)

    def validation(self, report: ValidationReport) -> None:
        """Log the losses."""
        self._log(report, validation_scalars(self._config, report))

    def close(self) -> None:
        """Finish the W&B run, as failed if an error ends the job."""
        if self._run is not None:
            run, self._run = self._run, None
            run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)

    def _log(self, report: IterationReport | ValidationReport, scalars: Iterable[tuple[str, float]]) -> None:
        progress = {
            "iteration": report.iteration,
            "consumed-train-samples": report.consumed_train_samples,
            "consumed-train-tokens": report.consumed_train_tokens,
        }
        self._run.log({**progress, **dict(scalars)})

    def _stored_id(self) -> str | None:
        if self._save is None or not (path := self._save / RUN_ID_NAME).is_file():
            return None
        return path.read_text(encoding="utf-8").strip() or None
