"""What a request costs as something grows."""
