"""A CUDA driver in memory, which PyCUDA and cuda-bindings run on without a GPU."""
