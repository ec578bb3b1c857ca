"""TensorRT plans: built, cached, described."""
