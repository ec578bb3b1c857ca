"""The HTTP edge of cobatch: settings, routes, wire formats, the command line."""

__version__ = "0.1.0"
