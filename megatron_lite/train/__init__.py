"""Training package: assembly of a run, training loop, evaluation, checkpoint saving."""
