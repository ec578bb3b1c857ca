"""The cost of a request as something grows."""
