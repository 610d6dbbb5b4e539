"""Node check package: facts and measurements of each rank, their collection on rank 0, judgement and table."""
