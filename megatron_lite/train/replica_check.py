"""Checks that data-parallel replicas are bitwise equal: at the start, and every N iterations; stops or repairs."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.backend.base import Backend
from megatron_lite.backend.comparison import MAX_LINES, describe_ranks
from megatron_lite.backend.environment import host_name
from megatron_lite.config.training import TrainingConfig
from megatron_lite.errors import FailedRank, TrainingError
from megatron_lite.metrics.reporter import Reporter
from megatron_lite.optim.replicas import Mismatch
from megatron_lite.train.engine import Engine


def check_replicas(
    engine: Engine, training: TrainingConfig, iteration: int, backend: Backend, reporter: Reporter
) -> None:
    """Compare the weights after an iteration that --check-weight-hash-across-dp-replicas-interval divides.

    A collective call. All ranks get the same mismatches, so all of them stop or repair.

    Raises:
        TrainingError: replicas differ, and --on-weight-mismatch is stop; or they still differ after a repair.
    """
    if not training.weight_check_interval or iteration % training.weight_check_interval or engine.world.size == 1:
        return
    with backend.phases.enter("comparing the weights of the replicas"):
        mismatches = engine.compare_replicas()
        if not mismatches:
            reporter.message(f">>> Weight hashes match after {iteration} iterations...")
            return
        hosts = engine.world.all_gather_object(backend.launch.host or host_name())
        found = _describe(mismatches, hosts)
        left = mismatches
        if training.on_weight_mismatch == "repair":
            engine.repair_replicas(mismatches)
            left = engine.compare_replicas()
            if not left:
                reporter.message(
                    f"WARNING: after iteration {iteration}, {found}; repaired, with the optimizer's state, from the "
                    "replica that is named last. Replace a device whose weights change by themselves"
                )
                return
            found = f"{_describe(left, hosts)}, also after a repair"
        equal, rank = iteration - training.weight_check_interval, left[0].differing[0]
        start = (
            f"a checkpoint of iteration {equal} or earlier (--load-iteration), since later ones may contain wrong "
            "weights"
            if equal > 0
            else "newly initialized weights, since all checkpoints may contain wrong weights"
        )
        error = TrainingError(
            f"Weights that all data-parallel replicas should share differ after iteration {iteration}: {found}",
            fix="Check the devices (`megatron-lite doctor`), leave a faulty host out (sbatch --exclude=HOST), "
            f"and resume from {start}. --on-weight-mismatch repair would continue with the weights of the ranks that "
            "are named last",
        )
        error.shared, error.silent = True, engine.world.rank != 0
        raise error from FailedRank(hosts[rank], rank)


def equalize_initial_weights(engine: Engine, backend: Backend, reporter: Reporter) -> None:
    """Give all replicas the same initial weights; a collective call.

    The random numbers of a GPU depend on its number of multiprocessors, so that unequal cards draw different weights.
    """
    if engine.world.size == 1:
        return
    with backend.phases.enter("comparing the initial weights"):
        if mismatches := engine.compare_replicas():
            engine.repair_replicas(mismatches)
            reporter.message(
                f"WARNING: {len(mismatches)} initial weights differed between ranks, whose devices draw different "
                f"random numbers ({backend.device_name()} on this one); all ranks now have the same, and another start "
                "may have others"
            )


def _describe(mismatches: Sequence[Mismatch], hosts: Sequence[str]) -> str:
    lines = []
    for mismatch in mismatches[:MAX_LINES]:
        equal = sorted(set(mismatch.hashes) - set(mismatch.differing))
        differing = describe_ranks(mismatch.differing, hosts)
        lines.append(f"{mismatch.name} on {differing}, unlike {describe_ranks(equal, hosts)}")
    if more := len(mismatches) - len(lines):
        lines.append(f"and {more} more")
    differ = "parameter differs" if len(mismatches) == 1 else "parameters differ"
    return f"{len(mismatches)} replicated {differ} between ranks: {'; '.join(lines)}"
