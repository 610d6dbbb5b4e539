"""megatron-lite train (pretrain_gpt.py): Megatron's command line in, a trained model out."""

from __future__ import annotations

import shutil
import sys
import time

from megatron_lite.backend.environment import Launch, read_launch
from megatron_lite.config.arguments import ParsedRun, asks_for_help, parse_run, raise_all
from megatron_lite.config.files import missing_files
from megatron_lite.errors import ConfigError

SUMMARY = "train a GPT; takes Megatron's command line"
SEVERAL_RANKS = True
"""A rank that fails before it met the others tells them."""


def run(argv: list[str]) -> int:
    """Trains, or with --dry-run only says what the command means."""
    started = time.monotonic()
    launch = read_launch()
    if asks_for_help(argv):
        from megatron_lite.config.help import help_text

        if launch.rank == 0:
            print(help_text(width=min(100, shutil.get_terminal_size().columns)))
        return 0
    parsed = parse_run(argv, world_size=None if launch.launcher == "python" else launch.world_size)
    if parsed.config.runtime.dry_run:
        if launch.rank == 0:
            from megatron_lite.cli.explain import explain_text

            print(explain_text(parsed))
        return 0
    # Several ranks look for their files once they have met: a file that one node lacks is an error of all ranks.
    missing = missing_files(parsed.config) if launch.world_size == 1 else []
    raise_all([*parsed.missing, *missing, *_not_launched(parsed, launch)])
    if launch.rank == 0:
        sys.stderr.write("".join(f"{line}\n" for line in (*parsed.notes, *parsed.warnings)))
    return _train(parsed, launch, started)


def _train(parsed: ParsedRun, launch: Launch, started: float) -> int:
    from megatron_lite.train.assemble import assembled
    from megatron_lite.train.exit_status import ExitRecord
    from megatron_lite.train.loop import evaluate
    from megatron_lite.train.start import already_complete
    from megatron_lite.train.unattended import train_job

    config = parsed.config
    if config.training.skip_train:
        with assembled(config) as run:
            evaluate(run, "validation", at_end=True)
            evaluate(run, "test", at_end=True)
        return 0
    with ExitRecord(config.checkpoint.save, launch.rank) as record:
        if (complete := already_complete(config)) is not None:
            if launch.rank == 0:
                print(complete)
            return 0
        record.end(train_job(config, record, started=started))
    return 0


def _not_launched(parsed: ParsedRun, launch: Launch) -> list[ConfigError]:
    wanted = parsed.config.parallel.world_size
    if launch.world_size == wanted:
        return []
    return [
        ConfigError(
            "A run of several ranks needs a launcher that starts them",
            found=f"the flags ask for {wanted} ranks, this is a single process",
            fix=f"Start it with `torchrun --nproc-per-node {wanted} pretrain_gpt.py …` or srun, or look at it with "
            "--dry-run",
        )
    ]
