"""The cost of a request."""
