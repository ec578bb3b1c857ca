"""Authentication and permissions: bearer tokens (JWT), API keys, tenants and their limits."""
