"""Language-model evaluation: loss, perplexity and bits per byte of texts and datasets."""
