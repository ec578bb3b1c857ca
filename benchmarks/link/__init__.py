"""The link between front-end processes and the engine process, without HTTP, batcher or engine."""
