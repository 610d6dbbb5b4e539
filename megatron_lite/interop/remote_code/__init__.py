"""Modeling files that exports contain, for classes that transformers lacks; loaded with trust_remote_code=True."""
