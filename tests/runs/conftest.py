"""Checkpoints to list, keep and roll back."""

from support.checkpoints import kit, on_ranks

__all__ = ["kit", "on_ranks"]
