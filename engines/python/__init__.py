"""Models written in Python: in a process of their own, or in the worker's thread."""
