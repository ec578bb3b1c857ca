"""Uvicorn's internals that the fast path leans on, named in one place and checked at start.

They are not a public interface. Where they are not as expected, `missing` says what is, and the
server goes without the fast path: slower, and right.
"""

from __future__ import annotations

import inspect

_PROTOCOL_METHODS = {
    "connection_made": ("transport",),
    "connection_lost": ("exc",),
    "data_received": ("data",),
    "on_message_begin": (),
    "on_url": ("url",),
    "on_header": ("name", "value"),
    "on_headers_complete": (),
    "on_body": ("body",),
    "on_message_complete": (),
    "on_response_complete": (),
    "pause_writing": (),
    "resume_writing": (),
    "shutdown": (),
    "send_400_response": ("msg",),
}
_PROTOCOL_INIT = ("config", "server_state", "app_state", "_loop")
# Set in the protocol's __init__ and read or written by us.
_PROTOCOL_ATTRIBUTES = (
    "config", "connections", "cycle", "expect_100_continue", "flow", "headers", "loop", "parser",
    "pipeline", "server_state", "timeout_keep_alive_task", "transport", "url",
)  # fmt: skip
# Read by the protocol of its `cycle`, so ours has them too.
_CYCLE_ATTRIBUTES = ("body", "disconnected", "keep_alive", "message_event", "more_body", "response_complete")
_FLOW_METHODS = ("pause_reading", "pause_writing", "resume_reading", "resume_writing")


def missing() -> str | None:
    """The first thing that is not as the fast path expects it, or None if all is."""
    try:
        from uvicorn.protocols.http.flow_control import FlowControl
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
        from uvicorn.server import ServerState
    except ImportError as error:
        return str(error)
    for name, parameters in _PROTOCOL_METHODS.items():
        if _parameters(HttpToolsProtocol, name) != parameters:
            return f"HttpToolsProtocol.{name}{parameters}"
    if _parameters(HttpToolsProtocol, "__init__") != _PROTOCOL_INIT:
        return "HttpToolsProtocol.__init__"
    sets = HttpToolsProtocol.__init__.__code__.co_names
    for name in _PROTOCOL_ATTRIBUTES:
        if name not in sets and name not in HttpToolsProtocol.on_message_begin.__code__.co_names:
            return f"HttpToolsProtocol.{name}"
    for name in _CYCLE_ATTRIBUTES:
        if name not in RequestResponseCycle.__init__.__code__.co_names:
            return f"RequestResponseCycle.{name}"
    for name in _FLOW_METHODS:
        if not callable(getattr(FlowControl, name, None)):
            return f"FlowControl.{name}"
    state = ServerState()
    for name in ("total_requests", "default_headers"):
        if not hasattr(state, name):
            return f"ServerState.{name}"
    return None


def _parameters(owner: type, name: str) -> tuple[str, ...] | None:
    method = getattr(owner, name, None)
    if method is None:
        return None
    return tuple(inspect.signature(method).parameters)[1:]
