"""Megatron-LM and DeepSpeed checkpoints: readers of each format, one table of names per naming scheme, and writers."""
