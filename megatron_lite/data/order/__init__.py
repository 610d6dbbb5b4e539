"""Sample order package: train/validation/test split, sample indices and caches, blending, cyclic sampling."""
