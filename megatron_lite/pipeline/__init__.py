"""Pipeline execution: runs the list of actions that schedules/ made for this rank."""
