"""What one request costs."""
