"""Job supervision package: stop conditions, failure reports, exit status, loss spikes, automatic rollback."""
