"""Counters, records of requests, traces, the access log, and who subscribes to them."""
