"""Run folder package: checkpoint manifests and catalog, retention, rollback, exit status, metrics.jsonl, lock."""
