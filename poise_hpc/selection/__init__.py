"""Which parent next, and what else the proposer should see: pure functions over entry summaries."""
