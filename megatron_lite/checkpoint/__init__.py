"""Distributed checkpoints: saving and loading a run as named global tensors that any parallel layout can read.

writing.py and reading.py store rectangles of tensors in torch.distributed.checkpoint's file format; save.py and load.py
do so for all ranks of a job, background.py saves while training continues, offline.py and rewriting.py work in one
process. The files around the tensors (manifest, catalog, retention) are in runs/.
"""
