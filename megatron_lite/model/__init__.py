"""The GPT, written once: it knows of parallelism only through the layers of parallel/."""
