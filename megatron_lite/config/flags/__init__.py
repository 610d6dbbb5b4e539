"""The flag table: one row per Megatron spelling, by group. The parser, --help and docs/arguments.md come from it."""
