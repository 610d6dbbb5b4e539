"""Distributed checkpoint package: saves and loads named global tensors in any parallel layout.

writing.py (CheckpointWriter) and reading.py (CheckpointReader) hold the format and are used by all others: save.py and
background.py save a run, load.py loads it, rewriting.py averages and reshards in one process, upscaling.py deepens a
model. The files around the tensors (manifest, catalog, retention) are in runs/.
"""
