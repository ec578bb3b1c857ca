"""What ends a load test before it has begun."""


class BenchError(Exception):
    """It cannot be run; the text is one line for a person."""


class UsageError(BenchError):
    """What was asked for cannot be."""
