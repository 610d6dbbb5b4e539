"""Megatron-LM and DeepSpeed checkpoint package: readers, writers and name tables of each format."""
