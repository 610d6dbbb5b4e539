"""Dataset file format: Megatron's .bin/.idx files, their checks, manifests and fingerprints."""
