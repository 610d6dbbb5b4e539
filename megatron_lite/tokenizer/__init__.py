"""Tokenizer package: Hugging Face, GPT-2 byte-level BPE, sentencepiece, null; tokenizer training.

Entry points are `build.build_tokenizer` and, for new tokenizers, `training`. No module imports torch; the library of a
tokenizer type is imported when such a tokenizer is built.
"""
