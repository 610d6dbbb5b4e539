"""Saving and loading a run as named global tensors, so that any layout reads what any other wrote.

storage.py writes and reads rectangles of tensors through torch.distributed.checkpoint; manifest.py says what a
checkpoint holds; save.py and load.py are the two directions; catalog.py finds checkpoints, verify.py checks their
bytes, retention.py deletes old ones; resume.py decides what a resumed run may change. Everything but storage, save,
load and background works without torch.
"""
