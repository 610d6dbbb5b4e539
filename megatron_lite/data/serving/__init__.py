"""Training data package: datasets of samples, loss and attention masks, micro-batch loading."""
