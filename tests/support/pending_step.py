"""Test double of an iteration in flight, whose outcome is changed."""

import dataclasses


class Changed:
    """Iteration in flight whose outcome has other fields, given as functions of the real outcome."""

    def __init__(self, step, **changes):
        self.step, self.changes = step, changes

    def outcome(self):
        outcome = self.step.outcome()
        return dataclasses.replace(outcome, **{name: change(outcome) for name, change in self.changes.items()})
