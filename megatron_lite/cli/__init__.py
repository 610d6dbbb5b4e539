"""Console commands: one module per command, each with a `SUMMARY` line and `run(argv)` returning the exit code.

Nothing heavy is imported until the command that needs it runs, so `--help` and typing errors answer at once.
"""
