"""The batcher in virtual time: minutes of load in seconds, with the code that serves.

`scenario.run` runs a `Scenario`. Scheduler, queue, admission and lanes are the production ones; the clock,
the engine and the clients are simulated.
"""
