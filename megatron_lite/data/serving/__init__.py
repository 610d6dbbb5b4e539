"""Reading samples for training: datasets, loss and attention masks, micro-batch loading."""
