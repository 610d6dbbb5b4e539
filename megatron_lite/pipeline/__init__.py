"""Pipeline package: executes a rank's list of schedule actions."""
