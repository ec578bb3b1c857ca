"""Front-end processes: HTTP in front, one process with scheduler and engines behind (docs/scaling.md)."""
