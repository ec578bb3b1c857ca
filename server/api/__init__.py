"""Routes that describe: V2 metadata, metrics, problems, profiles, explained requests."""
