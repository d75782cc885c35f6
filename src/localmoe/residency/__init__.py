"""Which experts are in memory. Decides, moves nothing."""
