"""Text to token ids and back: GPT-2's byte-level BPE, Hugging Face tokenizer files, sentencepiece, numbers as they are.

`build.build_tokenizer` is the way in. Nothing here imports torch, and the libraries behind each kind are imported
when that kind is built. `training` makes a new tokenizer from text; `vocabulary` pads a vocabulary for the mesh.
"""
