"""Scheduling, pure as a whole: no asyncio, no threads, no clock; the time is always an argument.

`scheduler` is the entry. From the bottom up: `tuning` has the constants, `priority` orders one tenant's
requests, `fair_queueing` the tenants, `queue` holds all of them; `run_times` predicts runs, `arrivals`
returning clients; `admission` lets requests in, `policy` says when a batch leaves and `formation` which
requests are in it.
"""
