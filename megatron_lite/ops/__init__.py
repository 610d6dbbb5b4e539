"""Cluster operations around a training job: reading, checking and submitting Slurm job scripts."""
