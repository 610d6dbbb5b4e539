"""CLI command `train` (pretrain_gpt.py): trains a GPT from Megatron's command line."""

from __future__ import annotations

import os
import shutil
import sys
import time

from megatron_lite.backend.environment import Launch, host_name, read_launch
from megatron_lite.backend.task_ranks import end_with_parent, start_ranks, visible_gpus
from megatron_lite.backend.xla_devices import count_xla_devices
from megatron_lite.config.arguments import asks_for_help, is_dry_run, parse_run, raise_all, save_folder
from megatron_lite.config.command_line import read_command_line
from megatron_lite.config.files import missing_files
from megatron_lite.config.flag import FIELD
from megatron_lite.config.given import Given
from megatron_lite.config.launcher import ranks_per_task
from megatron_lite.config.xla import device_count_errors
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_count
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
    count = _ranks_to_start(argv, launch) if broken is None else 1
    given = Given()
    read_command_line(argv, given)
    is_xla = given.run.runtime.device == "xla"
    if is_xla and (count > 1 or launch.local_world_size > 1):
        started_by = f"--ranks-per-task {count}" if count > 1 else launch.launcher
        broken = ConfigError(
            f"{started_by} starts {max(count, launch.local_world_size)} processes on {launch.host} with --device xla",
            rule="One process drives all devices of a host",
            fix="Remove --ranks-per-task" if count > 1 else "Start one process on each host",
        )
    elif count > 1 and launch.launcher == "torchrun":
        broken = ConfigError(
            f"--ranks-per-task {count} is given, but torchrun starts all ranks itself",
            fix="Remove --ranks-per-task, or replace torchrun by srun with one task for each node",
        )
    elif count > 1 and not is_dry_run(argv):
        return start_ranks([sys.executable, "-m", "megatron_lite", "train", *argv], launch, count)
    if launch.launcher == "task":
        end_with_parent()
    world_size = None if launch.launcher == "python" and count == 1 else launch.world_size * count
    devices = count_xla_devices() if is_xla else None
    if is_xla:  # the sizes count devices, which --world-size gives where they cannot be counted
        given_size = given.has(FIELD.parallel.world_size)
        world_size = None if given_size or devices is None else devices * launch.world_size
    # From here on, every error is written to exit_status.json.
    with ExitRecord(save_folder(argv), launch) as record:
        if broken is not None:
            raise broken
        parsed = parse_run(argv, world_size=world_size)
        if parsed.config.runtime.dry_run:
            if launch.rank == 0:
                from megatron_lite.cli.explain import explain_text

                print(explain_text(parsed))
            return 0
        errors, wanted = [*parsed.missing], parsed.config.parallel.world_size
        if launch.world_size == 1:  # several ranks compare which files they have after the rendezvous
            errors = missing_files(parsed.config, parsed.missing, parsed.spellings)
        if launch.world_size != wanted and not is_xla:
            errors.append(
                ConfigError(
                    f"The flags describe a run of {wanted} ranks, but the launcher started "
                    f"{format_count(launch.world_size, 'rank')}",
                    fix=f"Add --ranks-per-task {wanted} to start them all on this machine, start {wanted} ranks with "
                    "torchrun or "
                    "srun, or add --dry-run to check the command only",
                )
            )
        if is_xla:
            # Virtual devices are counted exactly; of a host's TPU chips the runtime may use a part.
            kind = "CPU" if os.environ.get("PJRT_DEVICE") == "CPU" else "TPU"
            counted = devices * launch.world_size if devices is not None and kind == "CPU" else wanted
            errors += device_count_errors(parsed.config.parallel, counted, launch.world_size, kind)
        raise_all(errors)
        if launch.rank == 0:
            sys.stderr.write("".join(f"{line}\n" for line in (*parsed.notes, *parsed.warnings)))

        from megatron_lite.train.job import train_job
        from megatron_lite.train.start import already_complete

        if (complete := already_complete(parsed.config)) is None:
            train_job(parsed.config, record, started=started, command=argv)
            return 0
        if launch.rank == 0:
            print(complete.text)
        record.begin(lambda: complete.iteration, trains=False)
        record.end("completed", f"training was complete after {complete.iteration} iterations: nothing was done")
        return 0


def _ranks_to_start(argv: list[str], launch: Launch) -> int:
    """Return the number of ranks that this process has to start; 1: it is a rank itself."""
    if launch.launcher == "task":
        return 1
    tasks_per_node = launch.local_world_size if launch.launcher == "slurm" else 0
    return ranks_per_task(argv, tasks_per_node=tasks_per_node, num_gpus=visible_gpus())
