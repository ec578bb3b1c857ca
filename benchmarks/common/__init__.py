"""Models, processes, load and requests that several benchmarks share."""
