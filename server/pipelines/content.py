"""The content types of requests to a handler."""

import encodings
import pkgutil
from collections.abc import Collection
from encodings.aliases import aliases

from cobatch.server.http.problem import Problem

JSON = "application/json"
# curl sends a form's type where it is given none.
_UNSAID = ("", "application/x-www-form-urlencoded")
# Python's own, which are no charsets: `punycode` and `idna` take quadratic time, `undefined` always fails.
_NO_CHARSETS = {
    "idna", "mbcs", "oem", "palmos", "punycode", "raw_unicode_escape", "undefined", "unicode_escape", "utf_7",
}  # fmt: skip
_CODECS = frozenset(one.name for one in pkgutil.iter_modules(encodings.__path__)) - _NO_CHARSETS


def is_json(accepts: Collection[str]) -> bool:
    """Return whether a handler takes JSON alone."""
    return tuple(accepts) == (JSON,)


def check_type(accepts: Collection[str], content_type: str) -> None:
    """Raise Problem if a handler does not take this content type."""
    kind = content_type.partition(";")[0].strip().lower()
    unsaid = kind in _UNSAID and len(accepts) == 1
    named = kind in accepts or f"{kind.partition('/')[0]}/*" in accepts
    if not accepts or named or unsaid or (is_json(accepts) and kind.endswith("+json")):
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


def codec_of(charset: str) -> str:
    """Return the name of a charset's codec. Raises LookupError.

    Python keeps each spelling that it is asked for, known or not: so it is asked for codecs' own names alone.
    """
    name = encodings.normalize_encoding(charset.lower())
    codec = aliases.get(name, name)
    if codec not in _CODECS:
        raise LookupError(charset)
    return codec
