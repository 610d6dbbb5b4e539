"""Where the parts meet: assembles a run from its config, steps it, evaluates, saves and stops it."""
