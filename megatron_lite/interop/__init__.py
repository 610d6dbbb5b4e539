"""Checkpoint conversion package: imports and exports Hugging Face, Megatron-LM, DeepSpeed weights; hub upload.

sources.py reads foreign files as named tensors, unpickling.py reads pickles without executing them, architectures/ maps
names and layouts (one table per architecture, used in both directions), importing.py and export.py stream tensors
through such a table, verify.py compares logits. runs/foreign.py recognises whose format a folder has.
"""
