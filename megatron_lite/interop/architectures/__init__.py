"""Hugging Face architectures package: one module each for config.json and tensors, import and export."""
