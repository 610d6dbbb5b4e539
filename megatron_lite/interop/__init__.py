"""Weights in and out: import and export of Hugging Face (and other) checkpoints, verified, and the hub.

sources.py reads foreign files as named tensors, unpickling.py reads pickles without executing them, architectures/ maps
names and layouts (one table per architecture, used in both directions), importing.py and export.py stream tensors
through such a table, verify.py compares logits. runs/foreign.py recognises whose format a folder has.
"""
