"""What is for those who watch the server, in the API's description: the live page and the metrics."""

from __future__ import annotations

from typing import Any

from cobatch.server.openapi.document import in_path, operation
from cobatch.server.openapi.native import ABOUT

Json = dict[str, Any]

_EVENTS = (
    "Server-sent events. `hello` first: what is served, its settings, and the last five minutes; then `tick` "
    "once a second: what each model did in it. What is in them follows the page and may change with it: "
    "for programs of your own there is `/metrics`."
)


def dashboard_paths() -> Json:
    """The page, its files and its feed."""

    def text(description: str, *media: str) -> Json:
        return {
            "200": {
                "description": description,
                "content": {one: {"schema": {"type": "string"}} for one in media},
            }
        }

    file = in_path("file", "A file's name.", example="style.css")
    files = ("text/css", "text/javascript", "image/svg+xml", "text/html")
    return {
        "/dashboard": {
            "get": operation("getDashboard", ABOUT, "The live page", "For people who watch the node.",
                             text("The page. It shows nothing by itself.", "text/html"), needs="open")
        },
        "/dashboard/static/{file}": {
            "get": operation("getDashboardFile", ABOUT, "A file of the live page", "Style, scripts, icon.",
                             text("The file.", *files), needs="open", problems=("not-found",),
                             parameters=[file])
        },
        "/dashboard/events": {
            "get": operation("getDashboardEvents", ABOUT, "What the live page shows", _EVENTS,
                             text("Events, until one side ends it.", "text/event-stream"), needs="admin")
        },
    }  # fmt: skip


def metrics_paths() -> Json:
    """What Prometheus reads."""
    formats = ("text/plain", "application/openmetrics-text")
    found = {
        "description": "The metrics now.",
        "content": {media: {"schema": {"type": "string"}} for media in formats},
    }
    about = "For Prometheus, or as OpenMetrics where `Accept` asks for it. docs/metrics.md lists all."
    return {
        "/metrics": {"get": operation("getMetrics", ABOUT, "Metrics", about, {"200": found}, needs="admin")}
    }
