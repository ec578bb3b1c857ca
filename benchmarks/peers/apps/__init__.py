"""The same small server in the idiom of each framework; each file runs in its own environment.

They import nothing from the repository but `shared.py` beside them. Their settings are environment variables,
which `benchmarks.peers.servers` sets.
"""
