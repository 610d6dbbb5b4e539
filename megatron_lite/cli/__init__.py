"""The console: one file per command, each a `SUMMARY` line and a `run(argv)` that returns the exit code.

Nothing heavy is imported until the command that needs it runs, so `--help` and typing errors answer at once.
"""
