"""Hostile bodies of every form, each sent while others ask for health and infer."""
