"""Rehearsal package: simulates all kinds of ranks of a large job on one machine with meta tensors."""
