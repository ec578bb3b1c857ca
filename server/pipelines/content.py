"""The content types of requests to a handler."""

from collections.abc import Collection

from cobatch.server.http.problem import Problem

JSON = "application/json"
# curl sends a form's type where it is given none.
_UNSAID = ("", "application/x-www-form-urlencoded")


def is_json(accepts: Collection[str]) -> bool:
    """Return whether a handler takes JSON alone."""
    return tuple(accepts) == (JSON,)


def check_type(accepts: Collection[str], content_type: str) -> None:
    """Raise Problem if a handler does not take this content type."""
    kind = content_type.partition(";")[0].strip().lower()
    unsaid = kind in _UNSAID and len(accepts) == 1
    if not accepts or kind in accepts or unsaid or (is_json(accepts) and kind.endswith("+json")):
        return
    detail = f"the content type is {kind or 'missing'}, expected {' or '.join(accepts)}"
    raise Problem("unsupported-media-type", detail, supported=list(accepts))


def parameter(content_type: str, name: str) -> str:
    """Return a parameter of a content type, "" if it has none (RFC 9110, 5.6.6)."""
    for item in content_type.split(";")[1:]:
        key, _, value = item.partition("=")
        if key.strip().lower() == name:
            return value.strip().strip('"')
    return ""
