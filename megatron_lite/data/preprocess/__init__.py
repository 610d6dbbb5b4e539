"""From text files to .bin/.idx: workers read byte ranges and write shards, the parent joins them.

`run.preprocess` is the way in. The result does not depend on the number of workers, appears under its final name
only when it is complete, and a run that was killed is continued by the same command.
"""
