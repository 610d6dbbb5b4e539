"""Optimizer package: mixed-precision optimizer, loss scaling, update rules, ZeRO-1 sharding.

The optimizer updates shards (parallel/buffers.py): flat ranges of this rank's parameters with their fp32 gradients.
Without ZeRO-1 a shard is a complete buffer; with ZeRO-1, this replica's slice of each bucket.
"""
