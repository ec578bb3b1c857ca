"""Stand-ins for packages that need a GPU; tier.py puts this folder on the path."""
