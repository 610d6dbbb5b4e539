"""Runs a pipeline schedule: interprets the list of actions that schedules/ made for this rank, one stage or many."""
