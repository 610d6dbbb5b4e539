"""The files of a run's --save folder; without torch."""
