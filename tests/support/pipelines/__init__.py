"""Handlers of pipelines for tests."""
