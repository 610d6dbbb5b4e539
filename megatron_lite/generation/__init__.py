"""Text generation package: token sampling and decoding with a KV cache."""
