"""Pipeline execution package: the executor of schedule actions, with its sends and receives."""
