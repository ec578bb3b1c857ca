"""Whose request it is: what is made by one subject is shown to no other.

Whatever authenticates sets `SUBJECT` in the ASGI scope, which no client can reach; where nothing does,
everybody is the same anonymous subject.
"""

from __future__ import annotations

from starlette.requests import Request

SUBJECT = "cobatch.subject"
ANONYMOUS = "anonymous"


def subject_of(request: Request) -> str:
    """The name of the authenticated caller, "anonymous" where nobody asked who it is."""
    subject: str = request.scope.get(SUBJECT, ANONYMOUS)
    return subject
