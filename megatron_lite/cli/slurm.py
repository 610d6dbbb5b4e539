"""CLI command `slurm`: checks and submits batch scripts; chains of jobs are in cli/slurm_chain.py."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.cli import slurm_chain
from megatron_lite.cli.parser import Parser, real
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.ops.submission import Submission

SUMMARY = "check a Slurm job script without a GPU and submit it, also as a chain of jobs"


def run(argv: list[str]) -> int:
    """Run `slurm submit`, or a command of a chain (cli/slurm_chain.py)."""
    own, passed_on = _split(argv)
    options = _parser(own[0] if own else "").parse_args(own)
    if options.command == "submit":
        return _submit(options, passed_on)
    return slurm_chain.run_command(options)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separate the script's own arguments, which follow its name."""
    for place, argument in enumerate(argv):
        if place and not argument.startswith("-") and Path(argument).is_file() and argv[0] == "submit":
            return argv[: place + 1], argv[place + 1 :]
    return argv, []


def _parser(called: str) -> Parser:
    parser = Parser(prog="megatron-lite slurm", description=SUMMARY[0].upper() + SUMMARY[1:] + ".")
    commands = parser.add_subparsers(dest="command", required=True)
    submit = commands.add_parser(
        "submit",
        help="check a job script, print the plan, then call sbatch",
        usage="megatron-lite slurm submit [--dry-run] [--chain] [--verbose] [--step-seconds S] "
        "[--sbatch=OPTIONS] SCRIPT [ARG …]",
    )
    submit.add_argument("--dry-run", action="store_true", help="check and print the plan; needs no Slurm")
    submit.add_argument("--chain", action="store_true", help="submit further jobs until the run is complete")
    submit.add_argument("--verbose", action="store_true", help="also print the configuration, as `explain` does")
    submit.add_argument(
        "--step-seconds",
        type=real(0, 1e6, above=True),
        help="seconds of an iteration (default: measured in the run, or a rough estimate)",
    )
    submit.add_argument(
        "--sbatch", default="", metavar="OPTIONS", help="options of sbatch, as '--nodes=8 --time=1:00:00'"
    )
    submit.add_argument("script", type=Path, help="the job script; its own arguments follow")
    slurm_chain.add_commands(commands, called)
    return parser


def _submit(options: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_lite.config.arguments import raise_all
    from megatron_lite.ops.chain_checks import check_run
    from megatron_lite.ops.job import read_job
    from megatron_lite.ops.partition import read_partitions
    from megatron_lite.ops.submission import check_job, working_folder

    try:
        given = shlex.split(options.sbatch)
    except ValueError as error:
        raise ConfigError(
            f"Cannot split --sbatch={options.sbatch} into options: {str(error).lower()}",
            fix="Close the quote, for example --sbatch='--nodes=8 --comment=\"two words\"'",
        ) from error
    job = read_job(options.script, environment=dict(os.environ), options=given, arguments=arguments)
    partitions = read_partitions()
    submission = check_job(job, step_seconds=options.step_seconds, partitions=partitions)
    away = options.dry_run and partitions is None
    check_run(submission, chain=options.chain, ask_slurm=not away)
    if options.verbose and submission.parsed is not None:
        from megatron_lite.cli.explain import explain_text

        with working_folder(job.folder):
            print(explain_text(submission.parsed), end="\n\n")
    sbatch = [*job.sbatch_options, *given]
    for title, text in [*submission.facts, *([("sbatch", shlex.join(sbatch))] if sbatch else [])]:
        print(f"{title:<11} {text}")
    for warning in submission.warnings:
        print(f"Warning     {warning}")
    if away:
        for missing in submission.local_problems:
            print(f"Not here    {missing.description}")
    sys.stdout.flush()
    raise_all([*submission.problems, *([] if away else submission.local_problems)])
    if options.dry_run:
        print("Not submitted (--dry-run): no problem was found")
        if away and submission.local_problems:
            print("            Slurm does not answer here; on the cluster each line `Not here` is an error")
        return 0
    if options.chain:
        from megatron_lite.ops.chain import start_chain

        assert submission.parsed is not None
        folder = submission.parsed.config.checkpoint.save
        job_id = start_chain(job.folder / folder, options.script, arguments, sbatch)
        print(f"Submitted batch job {job_id}, the first of a chain; `megatron-lite slurm status {folder}` shows it")
        return 0
    from megatron_lite.ops import slurm
    from megatron_lite.ops.resources import without_option

    if excluded := _exclude_option(submission):
        sbatch = [*without_option(sbatch, "exclude"), *excluded]
    sbatch += _comment_option(submission)
    print(f"Submitted batch job {slurm.submit(sbatch, str(options.script), arguments)}")
    return 0


def _comment_option(submission: Submission) -> list[str]:
    """Return --comment with the run's folder, by which `watch` finds a queued job; none if the job has a comment.

    The tasks of an array that use their index train different runs, and have one comment.
    """
    from megatron_lite.ops.watch_job import run_comment

    save = submission.parsed.config.checkpoint.save if submission.parsed is not None else ""
    job = submission.job
    differ = job.resources.array and b"SLURM_ARRAY" in job.path.read_bytes()
    if not save or differ or "comment" in job.resources.options:
        return []
    return [f"--comment={run_comment(job.folder / save)}"]


def _exclude_option(submission: Submission) -> list[str]:
    """Return --exclude with the hosts of the run's exclude file and those that the job itself excludes."""
    from megatron_lite.ops.exclude import exclude_option

    if not submission.excluded or submission.parsed is None:
        return []
    save = submission.job.folder / submission.parsed.config.checkpoint.save
    hosts = exclude_option(save, given=submission.job.resources.options.get("exclude", ""))
    return [f"--exclude={hosts}"] if hosts else []
