"""Cluster operations package: reading, checking, submitting and chaining Slurm jobs."""
