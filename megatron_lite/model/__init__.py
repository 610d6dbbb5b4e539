"""GPT model package: embedding, attention, MLP, norms, head; parallelism comes from the layers of parallel/."""
