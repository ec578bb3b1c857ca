"""cobatch beside other servers: `./scripts/bench-peers`."""
