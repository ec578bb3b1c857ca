"""Counters, records of requests, traces and the access log."""
