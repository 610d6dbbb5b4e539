"""Node check at the start of training (--check-nodes): ends the job and excludes bad hosts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from megatron_lite.backend.environment import read_launch
from megatron_lite.backend.nodelist import ranks_by_node
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import FailedRank, TrainingError
from megatron_lite.lifecycle.node_check import check_nodes, fast_check, plan_of
from megatron_lite.ops.doctor.report import Report
from megatron_lite.ops.doctor.show import print_check
from megatron_lite.ops.doctor.verdict import Verdict, name_hosts
from megatron_lite.ops.exclude import EXCLUDE_NAME, record_bad_hosts

TIMEOUT = 120.0
"""Seconds of the whole check; a third of them to wait for all ranks."""


def check_job_nodes(config: RunConfig) -> list[str]:
    """Check the nodes before the ranks connect for training; return lines for the log. A collective call.

    Raises:
        TrainingError: there are problems. Bad hosts are in the exclude file of --save, so that a chain avoids them.
    """
    launch = read_launch()
    save = config.checkpoint.save
    exclude_file = Path(save) / EXCLUDE_NAME if save else None

    def show(verdict: Verdict, reports: Mapping[int, Report]) -> None:
        print_check(verdict, reports, Console(file=sys.stdout, soft_wrap=True))
        sys.stdout.flush()
        record_bad_hosts(exclude_file, verdict.excluded)

    plan = plan_of(config, timeout=TIMEOUT, expected=ranks_by_node(launch.world_size))
    verdict = check_nodes(launch, fast_check(plan), show=show)
    if verdict.problems:
        raise _error(verdict, exclude_file, rank=launch.rank)
    return [verdict.summary, *(f"WARNING: {finding.text}" for finding in verdict.findings)]


def _error(verdict: Verdict, exclude_file: Path | None, *, rank: int) -> TrainingError:
    """Return the error that all ranks raise and rank 0 prints."""
    texts = "; ".join(finding.text for finding in verdict.problems)
    if verdict.excluded and exclude_file is not None:
        hosts = name_hosts(verdict.excluded)
        fix = (
            f"Submit the job again with `megatron-lite slurm submit JOB.slurm`, which leaves out {hosts} "
            f"({exclude_file}), as chains do; plain sbatch does not. After a repair: `megatron-lite doctor "
            f"{' '.join(f'--forgive {host}' for host in verdict.excluded)} --save {exclude_file.parent}`"
        )
    else:
        fix = verdict.problems[0].fix
    error = TrainingError(f"The node check found problems: {texts}", fix=fix)
    error.shared, error.silent = True, rank != 0
    hosts_with_problems = [*verdict.excluded, *(host for finding in verdict.problems for host in finding.hosts)]
    if hosts_with_problems:
        error.__cause__ = FailedRank(hosts_with_problems[0], verdict.first_ranks.get(hosts_with_problems[0], 0))
    return error
