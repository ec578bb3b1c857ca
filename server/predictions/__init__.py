"""The native resource: predictions that may outlive their request."""
