"""Tokenizers: Hugging Face, GPT-2 byte-level BPE, sentencepiece, null; tokenizer training.

`build.build_tokenizer` is the way in. Nothing here imports torch, and the libraries behind each kind are imported
when that kind is built. `training` makes a new tokenizer from text; `vocabulary` pads a vocabulary for the mesh.
"""
