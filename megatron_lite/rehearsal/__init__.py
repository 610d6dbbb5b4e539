"""Rehearsal: simulates ranks of a job on one machine with the real assembly on meta tensors."""
