"""One table per Hugging Face architecture: config.json, tensor names and transforms, for import and export alike."""
