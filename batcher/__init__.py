"""Admission, queue, scheduling, packing rows into a batch and giving each caller its own rows back.

Only `batcher`, `lanes` and `completion` know asyncio, and none knows HTTP.
"""
