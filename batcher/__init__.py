"""The heart: admission, queue, policy, packing rows into a batch, giving each caller its rows back.

Knows asyncio (in `batcher.batcher` alone) and nothing of HTTP.
"""
