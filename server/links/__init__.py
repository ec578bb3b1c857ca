"""The two ends of a link between home and another process: its requests, and the answers to them."""
