"""Packages that stand in for ones which need a GPU; gpu_tier.py puts this folder on the path."""
