"""Rehearsal package: dry run of a large job on one machine; simulates one rank of each kind on meta tensors."""
