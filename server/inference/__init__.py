"""Models, and the one place that decides whether a request may enter."""
