"""Common proxies before a server, each with a configuration of its own on loopback."""
