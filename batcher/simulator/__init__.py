"""The batcher in virtual time: minutes of load in seconds, with the very code that serves.

`simulate` runs a `Scenario`; queue, policy, latency model and dispatcher are the production ones. Only the
clock, the engine and the callers are stood in for.
"""
