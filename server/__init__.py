"""The HTTP edge: settings, routes, wire formats, the command line."""
