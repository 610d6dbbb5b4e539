"""Bash interpreter package: evaluates job scripts without starting any program."""
