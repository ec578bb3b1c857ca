"""What several benchmarks share: models, processes, load."""
