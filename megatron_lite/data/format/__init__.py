"""Dataset file format package: Megatron's .bin/.idx files, their checks, manifests and fingerprints."""
