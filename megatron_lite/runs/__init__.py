"""Files of a run (no torch): checkpoint manifests and catalog, retention, rollback, exit status, metrics.jsonl."""
