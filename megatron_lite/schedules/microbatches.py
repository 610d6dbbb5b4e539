"""Assignment of micro-batches to data-parallel replicas, evenly or not.

A global batch is K = global_batch / micro_batch micro-batches. Number k = index * dp + replica is the `index`-th of its
replica, so replicas hold uneven numbers when dp does not divide K, and none when K <= replica. Where dp does divide K
this is the order of Megatron's sampler, and in every case the iteration holds the same samples as on one replica.
"""

from __future__ import annotations


def total_microbatches(global_batch: int, micro_batch: int) -> int:
    """Micro-batches of one iteration over all replicas. `micro_batch` divides `global_batch` (config/batch.py)."""
    assert global_batch % micro_batch == 0, f"global batch {global_batch} is not whole micro-batches of {micro_batch}"
    return global_batch // micro_batch


def num_microbatches(global_batch: int, micro_batch: int, dp: int, replica: int) -> int:
    """Micro-batches that data-parallel replica `replica` of `dp` computes in an iteration of `global_batch` samples."""
    return (total_microbatches(global_batch, micro_batch) - replica + dp - 1) // dp


def microbatch_number(dp: int, replica: int, index: int) -> int:
    """Number within the iteration, over all replicas, of the `index`-th micro-batch of `replica`."""
    return index * dp + replica


def microbatch_start(consumed: int, micro_batch: int, dp: int, replica: int, index: int) -> int:
    """First sample of the `index`-th micro-batch of `replica`, if the iteration starts at sample `consumed`."""
    return consumed + microbatch_number(dp, replica, index) * micro_batch


def idle_share(global_batch: int, micro_batch: int, dp: int) -> float:
    """Share of the replicas' time without work because micro-batches are uneven, in [0, 1).

    The iteration lasts as long as replica 0, which always has the most. With no more micro-batches than replicas
    this is the share of replicas that have none.
    """
    return 1.0 - total_microbatches(global_batch, micro_batch) / (
        dp * num_microbatches(global_batch, micro_batch, dp, 0)
    )
