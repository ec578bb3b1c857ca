"""Scheduling: pure functions and objects that know neither asyncio, nor threads, nor the clock."""
