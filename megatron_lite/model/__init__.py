"""GPT model: embedding, transformer layers and head; parallel only through the layers of parallel/."""
