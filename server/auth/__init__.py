"""Who calls, and what they may: bearer tokens (JWT), API keys, permissions, tenants."""
