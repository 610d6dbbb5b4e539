"""Run configuration: frozen dataclasses, Megatron's flag table, command-line parsing and validation rules.

Nothing here imports torch, so a command line is checked in a fraction of a second on any machine.
"""
