"""ONNX Runtime, on the CPU or with other execution providers."""
