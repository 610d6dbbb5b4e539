"""Planner: parameter counts, schedules and costs of a run, computed from its config alone."""
