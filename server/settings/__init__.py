"""Settings from flags, environment and file, checked at start."""
