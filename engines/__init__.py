"""What runs a batch: the Engine protocol, the worker thread, the engines. No asyncio, no HTTP."""
