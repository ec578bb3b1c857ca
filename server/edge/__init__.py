"""The edge: HTTP/1.1 connections, the fast path below ASGI, and infer over ASGI."""
