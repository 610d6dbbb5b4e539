"""Assignment of micro-batches to data-parallel replicas, uneven counts included.

A global batch consists of K = global_batch / micro_batch micro-batches. Micro-batch k = index * dp + replica is number
`index` of its replica. Replicas have different counts if dp does not divide K, and a replica >= K has none. If dp
divides K, this is the order of Megatron's sampler. The iteration holds the same samples for every dp.
"""

from __future__ import annotations


def total_microbatches(global_batch: int, micro_batch: int) -> int:
    """Return the micro-batches of one iteration over all replicas; `micro_batch` divides `global_batch`."""
    assert global_batch % micro_batch == 0, f"global batch {global_batch} is not whole micro-batches of {micro_batch}"
    return global_batch // micro_batch


def num_microbatches(global_batch: int, micro_batch: int, dp: int, replica: int) -> int:
    """Return the micro-batches of data-parallel replica `replica` in an iteration of `global_batch` samples."""
    return (total_microbatches(global_batch, micro_batch) - replica + dp - 1) // dp


def microbatch_number(dp: int, replica: int, index: int) -> int:
    """Return the number, over all replicas, of micro-batch `index` of `replica`."""
    return index * dp + replica


def microbatch_start(consumed: int, micro_batch: int, dp: int, replica: int, index: int) -> int:
    """Return the first sample of micro-batch `index` of `replica` in the iteration that starts at sample `consumed`."""
    return consumed + microbatch_number(dp, replica, index) * micro_batch


def idle_share(global_batch: int, micro_batch: int, dp: int) -> float:
    """Return the idle share of the replicas' time due to uneven micro-batch counts, in [0, 1).

    Replica 0 has the most micro-batches and determines the duration of the iteration. With fewer micro-batches than
    replicas this is the share of replicas without any.
    """
    return 1.0 - total_microbatches(global_batch, micro_batch) / (
        dp * num_microbatches(global_batch, micro_batch, dp, 0)
    )
