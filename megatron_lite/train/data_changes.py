"""Messages on changed data of a resumed run: added samples and repeated samples."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.run import RunConfig
from megatron_lite.data.order.set_plan import SetPlan
from megatron_lite.runs.comparison import fingerprint_differences
from megatron_lite.schedules.data_order import DataSegment


def kept_order(before: DataSegment, now: DataSegment, config: RunConfig) -> Iterator[str]:
    """Yield a line for each way in which the order of the training data is not what a new run would have.

    Nothing is kept where the data or their order are others (--accept-changed data).

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
            "training data: --dataloader-type cyclic keeps the order that the run began with, that of micro-batches of "
            f"{micro_batch} on {replicas} replicas"
        )


def effect_of_other_data(plan: SetPlan, consumed: int) -> str:
    """Return what other training data, or another order, mean for a run that has consumed so many samples.

    Two orders of the same text have nothing to do with each other, so of the samples still to be read in an epoch the
    share that was read before is the share of the epoch that was read.
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
