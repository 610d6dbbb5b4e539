"""Training state import: iteration, consumed samples, scheduler position and Adam step of a foreign run."""

from __future__ import annotations

from typing import Any

from megatron_lite.errors import CheckpointError
from megatron_lite.interop.megatron.adam import WEIGHTS_ONLY
from megatron_lite.interop.megatron.arguments import Evidence
from megatron_lite.interop.megatron.flags import Stated
from megatron_lite.interop.megatron.found import Found
from megatron_lite.schedules.progress import Progress


def run_scalars(found: Found, stated: Stated, evidence: Evidence, notes: list[str]) -> dict[str, Any]:
    """Return `progress` and `engine` of a manifest's scalars.

    Args:
        found: the checkpoint, with optimizer state.
        stated: the command line.
        evidence: the args.
        notes: receives what was derived.

    Raises:
        CheckpointError: nothing says how many samples were consumed.
    """
    assert found.adam is not None
    args, iteration = evidence.arguments, found.iteration
    consumed = args.get("consumed_train_samples")
    if consumed is None:
        consumed = iteration * _global_batch_size(found, stated, evidence)
        notes.append(f"the files do not say how many samples were consumed: {consumed:,} follow from the iteration")
    length = args.get("seq_length") or stated.seq_length or 0
    applied = found.adam.step
    # The scheduler counts samples that were stepped with; old versions count iterations.
    scheduled = found.scheduler.get("num_steps")
    tokens = found.content.get("tokens") or args.get("consumed_train_tokens")
    progress = Progress(
        iteration=iteration,
        consumed_train_samples=int(consumed),
        consumed_valid_samples=int(args.get("consumed_valid_samples") or 0),
        consumed_train_tokens=int(tokens if tokens else int(consumed) * length),
        skipped_iterations=max(0, iteration - applied),
        applied_iterations=applied,
        applied_samples=int(consumed if scheduled is None else scheduled),
        applied_tokens=int(found.scheduler.get("num_tokens") or int(scheduled or consumed) * length),
    )
    return {
        "progress": progress.to_dict(),
        "engine": {"step": applied, "loss_scaler": dict(found.adam.loss_scaler)},
    }


def _global_batch_size(found: Found, stated: Stated, evidence: Evidence) -> int:
    args = evidence.arguments
    size = args.get("global_batch_size")
    if size is not None and stated.global_batch_size not in (0, size):
        raise CheckpointError(
            f"--global-batch-size {stated.global_batch_size} differs from the checkpoint's, which is {size} "
            "(global_batch_size in "
            f"{found.where})",
            fix="Remove --global-batch-size",
        )
    size = size or stated.global_batch_size
    if not size:
        raise CheckpointError(
            f"{found.where} states neither consumed_train_samples nor global_batch_size, so the number of samples "
            "that the run has consumed is unknown",
            rule="It is the iteration times the global batch size",
            fix="Add --global-batch-size with the value of the run that wrote the checkpoint, or "
            f"{WEIGHTS_ONLY[:1].lower()}{WEIGHTS_ONLY[1:]}",
        )
    return int(size)
