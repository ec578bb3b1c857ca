"""The process that starts the fronts and home, and hands connections to the fronts."""
