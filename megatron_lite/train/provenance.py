"""Comparison of a run with its checkpoint: tokenizer, data and code fingerprints at resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_lite.config.run import RunConfig
from megatron_lite.data.order.set_plan import SetPlan
from megatron_lite.runs.comparison import (
    changes_data,
    check_fingerprints,
    code_change,
    describe,
    fingerprint_differences,
    read_history,
)
from megatron_lite.runs.manifest import Provenance
from megatron_lite.schedules.data_order import DataSegment
from megatron_lite.train.batches import RunData
from megatron_lite.train.start import Start


def compare_with_checkpoint(
    start: Start, config: RunConfig, provenance: Provenance, data: RunData, notify: Callable[[str], None]
) -> None:
    """Refuse another tokenizer or other data than the checkpoint's; report accepted changes and changed code.

    Args:
        start: the checkpoint that the run starts from, if there is one.
        config: the run's.
        provenance: the run's.
        data: the run's.
        notify: receives the changes, as lines for the log.

    Raises:
        CheckpointError: tokenizer or data differ, and --accept-changed does not name them.
    """
    if start.manifest is None or config.checkpoint.finetune:
        return
    saved, continued = start.manifest.provenance, start.continued(config)
    effect = ""
    if continued is not None and data.train_plan is not None:
        effect = _effect_of_other_data(data.train_plan, continued.scalars["progress"]["consumed_train_samples"])
    current = dict(provenance.fingerprints)
    if continued is None or config.training.skip_train:  # the data begin anew, or are for evaluation only
        current = {name: value for name, value in current.items() if not name.startswith("data ")}
    accepted = check_fingerprints(
        saved.fingerprints, current, accepted=config.checkpoint.accept_changed, data_effect=effect
    )
    if accepted:
        effect_of_accepted = f"\n  {effect}" if effect and changes_data(accepted) else ""
        notify(
            f"WARNING: continuing with changes that --accept-changed accepts:\n{describe(accepted)}{effect_of_accepted}"
        )
    if (change := code_change(saved, provenance)) is not None:
        notify(f"WARNING: {change}")
    if effect and (before := read_history(saved, config)):
        for line in _kept_order(before[-1], provenance.data_history[-1], config):
            notify(line)


def _kept_order(before: DataSegment, now: DataSegment, config: RunConfig) -> Iterator[str]:
    """Yield a line for each way in which the order of the training data differs from that of a new run.

    There is none where the data or their order changed (--accept-changed data).

    Args:
        before: the checkpoint's last segment.
        now: this run's.
        config: this run's.
    """
    if fingerprint_differences(before.fingerprints, now.fingerprints):
        return
    if now.train_requests != before.train_requests and before.train_requests:
        yield (
            f"training data: {now.train_requests[-1]:,} samples instead of {before.train_requests[-1]:,}. Samples that "
            "were shuffled before keep their order and the additional ones follow them, so that no text is repeated "
            "before its epoch ends"
        )
    here = (config.batch.micro_batch_size, config.parallel.dp)
    if now.cyclic_layout is not None and now.cyclic_layout != here and now.cyclic_layout == before.cyclic_layout:
        micro_batch, replicas = now.cyclic_layout
        yield (
            "training data: --dataloader-type cyclic keeps the order with which the run began, that of micro-batches "
            f"of {micro_batch} on {replicas} replicas"
        )


def _effect_of_other_data(plan: SetPlan, consumed: int) -> str:
    """Return the effect of other training data, or another order, on a run that has consumed `consumed` samples.

    Two orders of the same text are independent: of the samples still to be read in an epoch, the share that was read
    before equals the share of the epoch that was read.
    """
    shares = plan.shares or (1.0,) * len(plan.sources)
    seen = sum(
        share * min(1.0, consumed * share / max(1.0, source.epoch_samples))
        for share, source in zip(shares, plan.sources, strict=True)
    )
    return (
        f"Effect: samples from {consumed:,} on are read in the new order. As far as the text is the same, about "
        f"{seen:.0%} of what is read next has been read before"
    )
