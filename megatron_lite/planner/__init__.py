"""What a run means and costs before anything runs: derived from its config by the functions that the trainer calls."""
