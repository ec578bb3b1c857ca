"""cobatch: an inference server that batches concurrent requests dynamically.

`cobatch.server` is the HTTP edge, `cobatch.batcher` forms the batches, `cobatch.engines` runs them.
"""

__version__ = "0.1.0"
