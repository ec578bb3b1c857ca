"""TensorRT plans: build, cache, manifest."""
