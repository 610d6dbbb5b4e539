"""CLI command `doctor`: checks devices, links, storage and clocks of all nodes, and writes bad ones to a file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.backend.environment import Launch, read_launch
from megatron_lite.backend.nodelist import ranks_by_node
from megatron_lite.backend.task_ranks import end_with_parent, start_ranks, visible_gpus
from megatron_lite.cli.output_file import check_output, write_output
from megatron_lite.cli.parser import Parser, real
from megatron_lite.cli.standard_output import make_console
from megatron_lite.config.arguments import parse_layout
from megatron_lite.config.launcher import TrainingCommand, ranks_per_task, read_command
from megatron_lite.config.parallel import replica_flags
from megatron_lite.config.run import CommandLine
from megatron_lite.errors import ConfigError, MegatronLiteError
from megatron_lite.formatting import format_count
from megatron_lite.ops.exclude import EXCLUDE_HOURS, EXCLUDE_NAME, forgive_hosts, read_exclusions, record_bad_hosts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megatron_lite.ops.doctor.report import Report
    from megatron_lite.ops.doctor.verdict import Verdict

TRAINER = "pretrain_gpt.py"
SUMMARY = "check GPUs, links, storage and clocks of one node or, under srun, of all"
USAGE = """megatron-lite doctor [OPTION …] [FLAG [VALUE] …]
       srun megatron-lite doctor [OPTION …] [FLAG [VALUE] … | pretrain_gpt.py FLAG [VALUE] …]
       megatron-lite doctor --forgive HOST --save FOLDER"""
EPILOG = """Flags are those of pretrain_gpt.py: --tensor-model-parallel-size and --pipeline-model-parallel-size set
the axes to measure; --save, --device and --ranks-per-task have effect, too. The model and batch of a whole training
command set the size of the messages. Exit code: 0 no problem, 1 problems."""


def run(argv: list[str]) -> int:
    """Check the nodes of this job, or this one; return 0 if there is no problem."""
    options, rest = _parser().parse_known_args(_joined(argv))
    launch = read_launch()
    try:
        command = read_command(rest) if rest else TrainingCommand((), None)
        count = _ranks_to_start(command, launch)
        started = launch.world_size * count
        known = started if started > 1 or launch.launcher != "python" else command.world_size
        flags = parse_layout(command.flags, world_size=known)
        if flags.runtime.device == "xla":
            raise ConfigError(
                "doctor does not measure --device xla",
                fix="Use --device cpu to check the storage and the network between hosts",
            )
        exclude_file = _exclude_file(options, flags)
        if options.forgive:
            return _forgive(options.forgive, exclude_file)
        _check_command(command, flags, known)
        if count > 1:
            return start_ranks([sys.executable, "-m", "megatron_lite", "doctor", *argv], launch, count)
        if launch.launcher == "task":
            end_with_parent()
        return _check(options, flags, launch, exclude_file)
    except MegatronLiteError as error:
        # Every rank has read the same arguments.
        error.silent = error.silent or (launch.rank != 0 and not error.shared)
        raise


def _ranks_to_start(command: TrainingCommand, launch: Launch) -> int:
    """Return the number of ranks that this process has to start, one for each GPU; 1: it is a rank itself."""
    if launch.launcher in ("task", "torchrun"):
        return 1
    tasks_per_node = {"slurm": launch.local_world_size, "python": 1}.get(launch.launcher, 0)
    return ranks_per_task(command.flags, tasks_per_node=tasks_per_node, num_gpus=visible_gpus())


def _parser() -> Parser:
    parser = Parser(
        prog="megatron-lite doctor",
        description=SUMMARY[0].upper() + SUMMARY[1:] + ".",
        usage=USAGE,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON; without FILE to stdout")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=real(10, 3600), default=180.0, help="longest duration (180)"
    )
    parser.add_argument("--fast", action="store_true", help="measure for a shorter time, as --check-nodes does")
    parser.add_argument("--exclude-file", type=Path, metavar="FILE", help=f"of bad hosts (--save/{EXCLUDE_NAME})")
    parser.add_argument(
        "--exclude-hours",
        metavar="HOURS",
        type=real(0, 10 * 8760, above=True),
        default=EXCLUDE_HOURS,
        help=f"time after which entries expire ({EXCLUDE_HOURS:g})",
    )
    parser.add_argument("--forgive", action="append", metavar="HOST", help="remove a host from the exclude file")
    return parser


def _joined(argv: list[str]) -> list[str]:
    """Join --json with a following file name; another argument after it belongs to the training command."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] == "--json":
            joins = word.endswith(".json")
            words[-1:] = [f"--json={word}"] if joins else ["--json=-", word]
        else:
            words.append(word)
    return words


def _exclude_file(options: argparse.Namespace, flags: CommandLine) -> Path | None:
    if options.exclude_file is not None:
        path: Path = options.exclude_file
        return path
    return Path(flags.checkpoint.save) / EXCLUDE_NAME if flags.checkpoint.save else None


def _forgive(hosts: list[str], path: Path | None) -> int:
    """Remove hosts from the exclude file."""
    if path is None:
        raise ConfigError(
            "--forgive is given, but no exclude file from which to remove hosts",
            fix="Add --save FOLDER of the run, or --exclude-file",
        )
    listed = [entry.host for entry in read_exclusions(path)]
    if unknown := [host for host in hosts if host not in listed]:
        raise ConfigError(
            f"{path} does not exclude {', '.join(unknown)}",
            fix=f"Give one of {', '.join(listed)}" if listed else "Give the --save folder of the run that excludes it",
        )
    print(f"{path}: removed {', '.join(forgive_hosts(path, hosts))}")
    return 0


def _check_command(command: TrainingCommand, flags: CommandLine, ranks: int | None) -> None:
    """Raise an error if the training script does not exist, or the layout does not fit the ranks."""
    script = Path(command.script)
    # The documentation's name stands for the trainer in any folder.
    if script.suffix == ".py" and not script.is_file() and (script.is_absolute() or script.name != TRAINER):
        raise ConfigError(
            f"The training script {script} does not exist",
            fix=f"Give the path of the script that trains, {TRAINER}, or the flags alone",
        )
    replica = flags.parallel.replica_size
    if ranks is not None and ranks % replica:
        raise ConfigError(
            f"The node check runs on {format_count(ranks, 'rank')}, which is no multiple of {replica}, the ranks "
            f"of a model replica ({replica_flags(flags.parallel)})",
            fix="Start it on all nodes of the job (srun megatron-lite doctor …), or give sizes whose product divides "
            f"{ranks}",
        )


def _check(options: argparse.Namespace, flags: CommandLine, launch: Launch, exclude_file: Path | None) -> int:

    from megatron_lite.lifecycle.node_check import check_nodes, fast_check, plan_of
    from megatron_lite.ops.doctor.show import json_record, print_check

    json_file = _json_file(options.json)

    def show(verdict: Verdict, reports: Mapping[int, Report]) -> None:
        written = record_bad_hosts(exclude_file, verdict.excluded, hours=options.exclude_hours)
        record = json_record(verdict, reports, exclude_file=exclude_file, written=written)
        if options.json == "-":
            print(json.dumps(record, indent=2))
        else:
            print_check(verdict, reports, make_console(soft_wrap=True))
        sys.stdout.flush()
        if json_file is not None:
            write_output(json_file, json.dumps(record, indent=2) + "\n", "--json")

    plan = plan_of(flags, timeout=options.timeout, expected=ranks_by_node(launch.world_size))
    fast = fast_check(plan)
    needed, needed_fast = (made.needed_seconds(launch.world_size) for made in (plan, fast))
    if options.timeout < (needed_fast if options.fast else needed):
        enough = f"--fast --timeout {max(needed_fast, options.timeout):g}"
        raise ConfigError(
            f"--timeout {options.timeout:g} is not enough time: "
            + (f"the fast measurements may take {needed_fast} s" if options.fast else f"all may take {needed} s"),
            fix=f"Give --timeout {needed_fast} or more"
            if options.fast
            else f"Give --timeout {needed} or more, or make fewer measurements with {enough}",
        )
    verdict = check_nodes(launch, fast if options.fast else plan, show=show)
    # torchrun ends all ranks once one has failed, and reports each as a failure.
    return 1 if verdict.problems and launch.rank == 0 else 0


def _json_file(name: str | None) -> Path | None:
    """Return the file of --json, and check before the measurements that it can be written."""
    if name in (None, "-"):
        return None
    path = Path(str(name))
    reason = "its folder does not exist" if not path.parent.is_dir() else "no permission"
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(
            f"Cannot write --json {path}: {'it is a folder' if path.is_dir() else reason}",
            fix="Give a file in a folder that you may write to",
        )
    check_output(path, json.dumps({"good": False}, indent=2), "--json")
    return path
