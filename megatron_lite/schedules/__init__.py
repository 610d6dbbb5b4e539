"""Schedules as pure functions of config and progress: batch size, learning rate, saves, pipeline actions.

Trainer, planner and `explain` call the same functions, so none of them can disagree; nothing here imports torch.
"""
