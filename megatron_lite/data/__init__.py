"""Data package: Megatron's .bin/.idx format, sample order, loading for training, offline preparation.

Everything is numpy on memory-mapped files. The tokens of a micro-batch are a pure function of the configuration and the
number of samples consumed, in Megatron's order.
"""
