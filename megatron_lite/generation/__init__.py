"""Text from a trained model: how the next token is chosen, and the loop that feeds it back through the KV cache."""
