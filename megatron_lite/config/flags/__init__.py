"""Flag table: one entry per Megatron flag; the parser, --help and docs/arguments.md are generated from it."""
