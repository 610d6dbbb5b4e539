"""Configuration package: frozen dataclasses that declare the flags, command-line parsing, validation.

Nothing here imports torch, so a command line is checked in a fraction of a second on any machine.
"""
