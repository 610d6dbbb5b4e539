"""CLI command `train` (pretrain_gpt.py): trains a GPT from Megatron's command line."""

from __future__ import annotations

import shutil
import sys
import time

from megatron_lite.backend.environment import Launch, host_name, read_launch
from megatron_lite.config.arguments import ParsedRun, asks_for_help, parse_run, raise_all, save_folder
from megatron_lite.config.files import missing_files
from megatron_lite.errors import ConfigError
from megatron_lite.lifecycle.exit_status import ExitRecord

SUMMARY = "train a GPT; takes Megatron's command line"
SEVERAL_RANKS = True
"""A rank that fails before it met the others tells them."""


def run(argv: list[str]) -> int:
    """Trains, or with --dry-run only says what the command means."""
    started = time.monotonic()
    try:
        launch, broken = read_launch(), None
    except ConfigError as error:
        launch, broken = Launch(host=host_name()), error
    if asks_for_help(argv):
        from megatron_lite.config.help import help_text

        if launch.rank == 0:
            print(help_text(width=min(100, shutil.get_terminal_size().columns)))
        return 0
    # From here on, whatever goes wrong is written to exit_status.json.
    with ExitRecord(save_folder(argv), launch) as record:
        if broken is not None:
            raise broken
        return _run(argv, launch, record, started)


def _run(argv: list[str], launch: Launch, record: ExitRecord, started: float) -> int:
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
    _train(parsed, launch, record, started)
    return 0


def _train(parsed: ParsedRun, launch: Launch, record: ExitRecord, started: float) -> None:
    from megatron_lite.train.job import train_job
    from megatron_lite.train.start import already_complete

    if (complete := already_complete(parsed.config)) is None:
        train_job(parsed.config, record, started=started)
        return
    if launch.rank == 0:
        print(complete.text)
    record.begin(lambda: complete.iteration, trains=False)
    record.end("completed", f"training was complete after {complete.iteration} iterations: nothing was done")


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
