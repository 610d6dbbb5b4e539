"""Periodic weight check: compares replicated parameters every N iterations; stops or repairs."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_lite.backend.comparison import MAX_LINES, describe_ranks
from megatron_lite.errors import FailedRank, TrainingError
from megatron_lite.optim.replicas import Mismatch

if TYPE_CHECKING:
    from megatron_lite.train.loop import Run


def check_weights_if_due(run: Run) -> None:
    """Compare the weights after an iteration that --check-weight-hash-across-dp-replicas-interval divides.

    A collective call. Whether weights differ is known to every rank, so all of them stop or repair.

    Raises:
        TrainingError: replicas differ, and --on-weight-mismatch is stop; or they still differ after a repair.
    """
    training, iteration = run.config.training, run.progress.iteration
    if not training.weight_check_interval or iteration % training.weight_check_interval or run.mesh.world.size == 1:
        return
    mismatches = run.engine.compare_replicas()
    if not mismatches:
        run.reporter.message(f">>> Weight hashes match after {iteration} iterations...")
        return
    hosts = run.mesh.world.all_gather_object(run.mesh.backend.launch.host or socket.gethostname())
    found = _describe(mismatches, hosts)
    if training.on_weight_mismatch == "stop":
        raise _error(run, mismatches, hosts, found)
    run.engine.repair_replicas(mismatches)
    if left := run.engine.compare_replicas():
        raise _error(run, left, hosts, f"{_describe(left, hosts)}, also after a repair")
    run.reporter.message(
        f"WARNING: after iteration {iteration} {found}; repaired, with the optimizer's state, from the replica that is "
        "named last. A device whose weights change by themselves should be replaced"
    )


def _describe(mismatches: Sequence[Mismatch], hosts: Sequence[str]) -> str:
    lines = []
    for mismatch in mismatches[:MAX_LINES]:
        equal = sorted(set(mismatch.hashes) - set(mismatch.differing))
        differing = describe_ranks(mismatch.differing, hosts)
        lines.append(f"{mismatch.name} on {differing}, unlike {describe_ranks(equal, hosts)}")
    if more := len(mismatches) - len(lines):
        lines.append(f"and {more} more")
    count = "1 parameter differs" if len(mismatches) == 1 else f"{len(mismatches)} parameters differ"
    return f"{count} between ranks that must hold the same: {'; '.join(lines)}"


def _error(run: Run, mismatches: Sequence[Mismatch], hosts: Sequence[str], found: str) -> TrainingError:
    iteration = run.progress.iteration
    equal = iteration - run.config.training.weight_check_interval
    rank = mismatches[0].differing[0]
    error = TrainingError(
        "Replicas of the weights must be equal, bit for bit",
        found=f"after iteration {iteration} {found}",
        fix="Nothing was saved after this iteration. Go on without the device that differs (its memory may be faulty), "
        + (
            f"from a checkpoint of iteration {equal} or earlier (--load-iteration): later ones may hold such weights. "
            if equal > 0
            else "from the start: checkpoints so far may hold such weights. "
        )
        + "--on-weight-mismatch repair goes on with the weights of the other replicas",
    )
    error.shared, error.silent = True, run.mesh.world.rank != 0
    error.__cause__ = FailedRank(hosts[rank], rank)
    return error
