"""TensorRT on an NVIDIA GPU: plans are built, kept and run here. One thread, no asyncio, no HTTP."""
