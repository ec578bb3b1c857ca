"""The same small server in each framework's own idiom; each file runs in an environment of its own.

They know nothing of the rest of the repository: `shared.py` beside them is all they have in common. What they
are told, they are told by variables of the environment, which `benchmarks.peers.catalogue` sets.
"""
