"""The rules between a run's fields, one function each, by subject; config/rules.py runs them all."""
