"""Rows in and out of a batch: packing, padding, splitting."""
