"""The Engine protocol, the worker thread that runs batches, and the engines. No asyncio, no HTTP."""
