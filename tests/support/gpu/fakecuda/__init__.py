"""A CUDA driver in memory, for PyCUDA and cuda-bindings to run on where there is no GPU."""
