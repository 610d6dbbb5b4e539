"""Schedules package, pure functions of config and progress: batch size, learning rate, saves, pipeline actions.

The trainer, the planner and `explain` call the same functions. Nothing here imports torch.
"""
