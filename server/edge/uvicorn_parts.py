"""Uvicorn's internals that the fast path leans on, named in one place and checked at start.

They are not a public interface. Where they are not as expected, `missing` says what is, and the
server goes without the fast path: slower, and right.
"""

from __future__ import annotations

import inspect

_PROTOCOL_METHODS = {
    "__init__": ("config", "server_state", "app_state", "_loop"),
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
    "_start_asgi_task": ("cycle", "app"),
}
# Set in the protocol's __init__ and read or written by us.
_PROTOCOL_ATTRIBUTES = (
    "config", "connections", "cycle", "expect_100_continue", "flow", "headers", "loop", "parser",
    "pipeline", "server_state", "timeout_keep_alive_task", "transport", "url",
)  # fmt: skip
# Read by the protocol of its `cycle`, so ours has them too.
_CYCLE_ATTRIBUTES = (
    "body", "disconnected", "keep_alive", "message_event", "more_body", "response_complete",
    "response_started",
)  # fmt: skip
_FLOW_METHODS = ("pause_reading", "pause_writing", "resume_reading", "resume_writing")
_FLOW_ATTRIBUTES = ("read_paused", "write_paused")


def missing() -> str | None:
    """The first thing that is not as the fast path expects it, or None if all is."""
    try:
        from uvicorn.protocols.http.flow_control import FlowControl
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
        from uvicorn.server import ServerState
    except ImportError as error:
        return str(error)
    set_in = (
        HttpToolsProtocol.__init__.__code__.co_names + HttpToolsProtocol.on_message_begin.__code__.co_names
    )
    cycle_sets = RequestResponseCycle.__init__.__code__.co_names
    if _parameters(FlowControl, "__init__") != ("transport",):
        return "FlowControl.__init__"
    for name in _FLOW_ATTRIBUTES:
        if name not in FlowControl.__init__.__code__.co_names:
            return f"FlowControl.{name}"
    state = ServerState()
    checks = [
        *(
            (f"HttpToolsProtocol.{m}", _parameters(HttpToolsProtocol, m) == p)
            for m, p in _PROTOCOL_METHODS.items()
        ),
        *((f"HttpToolsProtocol.{name}", name in set_in) for name in _PROTOCOL_ATTRIBUTES),
        *((f"RequestResponseCycle.{name}", name in cycle_sets) for name in _CYCLE_ATTRIBUTES),
        *((f"FlowControl.{name}", callable(getattr(FlowControl, name, None))) for name in _FLOW_METHODS),
        *((f"ServerState.{name}", hasattr(state, name)) for name in ("total_requests", "default_headers")),
    ]
    return next((name for name, as_expected in checks if not as_expected), None)


def _parameters(owner: type, name: str) -> tuple[str, ...] | None:
    method = getattr(owner, name, None)
    if method is None:
        return None
    return tuple(inspect.signature(method).parameters)[1:]
