"""Console commands: one module per command, each with a `SUMMARY` line and `run(argv)` returning the exit code.

torch is imported inside the commands that need it, so that `--help` and usage errors are fast.
"""
