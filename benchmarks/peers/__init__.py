"""cobatch and what its users would pick in its place, side by side: `./scripts/bench-peers`."""
