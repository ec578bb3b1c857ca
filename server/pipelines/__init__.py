"""Pipelines: users' code in a pool of processes, whose steps are models of the server (docs/pipelines.md)."""
