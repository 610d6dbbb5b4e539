"""Hugging Face architectures package: one mapping per architecture, of config.json and tensors, both ways."""
