"""CLI command `train` (pretrain_gpt.py): trains a GPT from Megatron's command line."""

from __future__ import annotations

import shutil
import sys
import time

from megatron_lite.backend.environment import Launch, host_name, read_launch
from megatron_lite.config.arguments import asks_for_help, parse_run, raise_all, save_folder
from megatron_lite.config.files import missing_files
from megatron_lite.errors import ConfigError
from megatron_lite.lifecycle.exit_status import ExitRecord

SUMMARY = "train a GPT; takes Megatron's command line"
SEVERAL_RANKS = True
"""A rank of several that fails before the rendezvous reports its error to the others (see cli/main.py)."""


def run(argv: list[str]) -> int:
    """Train; with --dry-run, print the run's plan only."""
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
    # From here on, every error is written to exit_status.json.
    with ExitRecord(save_folder(argv), launch) as record:
        if broken is not None:
            raise broken
        parsed = parse_run(argv, world_size=None if launch.launcher == "python" else launch.world_size)
        if parsed.config.runtime.dry_run:
            if launch.rank == 0:
                from megatron_lite.cli.explain import explain_text

                print(explain_text(parsed))
            return 0
        errors, wanted = [*parsed.missing], parsed.config.parallel.world_size
        if launch.world_size == 1:  # several ranks compare which files they have after the rendezvous
            errors = missing_files(parsed.config, parsed.missing)
        if launch.world_size != wanted:
            errors.append(
                ConfigError(
                    f"The flags describe a run of {wanted} ranks, and this is a single process",
                    fix=f"Start it with `torchrun --nproc-per-node {wanted} pretrain_gpt.py …` or srun, or add "
                    "--dry-run to print the plan",
                )
            )
        raise_all(errors)
        if launch.rank == 0:
            sys.stderr.write("".join(f"{line}\n" for line in (*parsed.notes, *parsed.warnings)))

        from megatron_lite.train.job import train_job
        from megatron_lite.train.start import already_complete

        if (complete := already_complete(parsed.config)) is None:
            train_job(parsed.config, record, started=started)
            return 0
        if launch.rank == 0:
            print(complete.text)
        record.begin(lambda: complete.iteration, trains=False)
        record.end("completed", f"training was complete after {complete.iteration} iterations: nothing was done")
        return 0
