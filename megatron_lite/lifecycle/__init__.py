"""Life of a job: stop conditions, failure reporting, loss-spike detection, automatic rollback."""
