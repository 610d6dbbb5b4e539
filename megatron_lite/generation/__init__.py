"""Text generation: sampling and the decoding loop with a KV cache."""
