"""The floor: bare uvicorn with an application that does nothing.

`python -m benchmarks.request_cost.floor_app SIZE CONTENT_TYPE` listens on a free loopback port, prints it,
and answers every request, after receiving its body, with the same SIZE bytes.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

_Receive = Callable[[], Awaitable[dict[str, Any]]]
_Send = Callable[[dict[str, Any]], Awaitable[None]]


def make_app(size: int, content_type: str) -> Callable[[Any, _Receive, _Send], Awaitable[None]]:
    """Return an ASGI application that reads the request and answers with a fixed body of `size` bytes."""
    start = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", content_type.encode()), (b"content-length", b"%d" % size)],
    }
    body = {"type": "http.response.body", "body": b"x" * size}

    async def app(_scope: Any, receive: _Receive, send: _Send) -> None:
        while (await receive()).get("more_body", False):
            pass
        await send(start)
        await send(body)

    return app


def main() -> None:
    """Serve until SIGTERM."""
    size, content_type = int(sys.argv[1]), sys.argv[2]
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    config = uvicorn.Config(
        make_app(size, content_type),
        http="httptools",
        loop="uvloop",
        lifespan="off",
        access_log=False,
        log_level="warning",
    )
    host, port = listener.getsockname()
    print(f"floor: listening on http://{host}:{port}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
