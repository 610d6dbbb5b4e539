"""Plays ranks of a job on one machine: the real assembly, schedule, layers and optimizer, on tensors without values."""
