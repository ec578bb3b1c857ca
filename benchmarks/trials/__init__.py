"""Trials of a real server by hostile and by very many clients: each prints a table and fails on a finding."""
