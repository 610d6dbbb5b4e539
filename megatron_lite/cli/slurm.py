"""CLI command `slurm`: checks and submits batch scripts; chains of jobs are in cli/slurm_chain.py."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_lite.cli import slurm_chain
from megatron_lite.cli.parser import Parser, real
from megatron_lite.errors import ConfigError

SUMMARY = "check a Slurm job script without a GPU and submit it, also as a chain of jobs"


def run(argv: list[str]) -> int:
    """Run `slurm submit`, or a command of a chain (cli/slurm_chain.py)."""
    own, passed_on = _split(argv)
    options = _parser().parse_args(own)
    if options.command == "submit":
        return _submit(options, passed_on)
    return slurm_chain.run_command(options)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separate the script's own arguments, which follow its name."""
    for place, word in enumerate(argv):
        if place and not word.startswith("-") and Path(word).is_file() and argv[0] == "submit":
            return argv[: place + 1], argv[place + 1 :]
    return argv, []


def _parser() -> Parser:
    parser = Parser(prog="megatron-lite slurm", description=SUMMARY[0].upper() + SUMMARY[1:] + ".")
    commands = parser.add_subparsers(dest="command", required=True)
    submit = commands.add_parser(
        "submit",
        help="check a job script, print its plan, then call sbatch",
        usage="megatron-lite slurm submit [--dry-run] [--chain] [--step-seconds S] [--sbatch=OPTIONS] SCRIPT [ARG …]",
    )
    submit.add_argument("--dry-run", action="store_true", help="check and print only; needs no Slurm")
    submit.add_argument("--chain", action="store_true", help="submit further jobs until the run is complete")
    submit.add_argument(
        "--step-seconds", type=real(0, 1e6, above=True), help="seconds of an iteration (default: the run's)"
    )
    submit.add_argument(
        "--sbatch", default="", metavar="OPTIONS", help="options of sbatch, as '--nodes=8 --time=1:00:00'"
    )
    submit.add_argument("script", type=Path, help="the job script; its own arguments follow")
    slurm_chain.add_commands(commands)
    return parser


def _submit(options: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_lite.cli.explain import explain_text
    from megatron_lite.config.arguments import raise_all
    from megatron_lite.ops.job import read_job
    from megatron_lite.ops.submission import check_job

    sbatch = shlex.split(options.sbatch)
    job = read_job(options.script, environment=dict(os.environ), options=sbatch, arguments=arguments)
    submission = check_job(job, step_seconds=options.step_seconds)
    if submission.parsed is not None:
        print(explain_text(submission.parsed))
        print()
    for title, text in submission.facts:
        print(f"{title:<11} {text}")
    for warning in submission.warnings:
        print(f"Warning     {warning}")
    sys.stdout.flush()
    raise_all(submission.problems)
    if options.dry_run:
        print("Not submitted (--dry-run): no problem was found")
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not installed here", fix="Submit from a login node of the cluster, or pass --dry-run"
        )
    sys.stdout.flush()
    if options.chain:
        from megatron_lite.ops.chain import start_chain

        folder = submission.parsed.config.checkpoint.save if submission.parsed else ""
        if not folder:
            raise ConfigError(
                "A chain needs a run folder, and the command has no --save", fix="Add --save and --load FOLDER"
            )
        job_id = start_chain(job.folder / folder, options.script, arguments, sbatch)
        print(f"Submitted batch job {job_id}, the first of a chain; `megatron-lite slurm status {folder}` shows it")
        return 0
    return subprocess.run(["sbatch", *sbatch, str(options.script), *arguments], check=False).returncode
