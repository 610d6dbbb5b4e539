"""Saving and loading a run as named global tensors, so that any layout reads what any other wrote.

writing.py and reading.py store rectangles of tensors through torch.distributed.checkpoint, and manifest.py says what a
checkpoint holds; save.py and load.py are the two directions for all ranks together, background.py saves while training
goes on, offline.py works on checkpoints in one process. catalog.py finds checkpoints, turnover.py lets them come and
go, verify.py checks their bytes, retention.py deletes old ones, resume.py says what a resumed run may change: these
need no torch.
"""
