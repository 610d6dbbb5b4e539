"""How good a trained model is: the mean loss and perplexity of a text or a dataset."""
