"""TensorRT on an NVIDIA GPU: plans are built, cached and run, on one thread."""
