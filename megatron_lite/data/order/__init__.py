"""Sample order: train/validation/test split, sample indices and their caches, blending, cyclic sampling."""
