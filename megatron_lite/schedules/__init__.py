"""When things happen: batch sizes, learning rates, saves and pipeline actions as pure functions of config and progress.

Trainer, planner and `explain` call the same functions, so none of them can disagree; nothing here imports torch.
"""
