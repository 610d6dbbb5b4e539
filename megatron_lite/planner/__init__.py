"""Planner package: summary of a run from its config before it starts (parameters, FLOPs, layout, length)."""
