"""Training: assembles a run from its configuration, and runs the training loop, evaluations and saves."""
