"""The problems as one page of Markdown: `python -m server.problem_docs > docs/problems.md`."""

from __future__ import annotations

import sys

from server.problem_kinds import KINDS
from server.problem_members import ALWAYS, MEMBERS, SOMETIMES

_INTRO = """\
# Problems

<!-- Made by `python -m server.problem_docs`; a test fails when it is out of date. -->

Whatever goes wrong is answered with `application/problem+json` (RFC 9457). Programs look at `type`: it
stays the same over versions, and different situations under one status have different types. The server
explains each type itself, at `GET /problems/SLUG`. Members that say nothing are left out.
"""


def markdown() -> str:
    """The whole page."""
    kinds = [
        f"| `{kind.slug}` | {kind.status} | {kind.title} | {kind.meaning} *{kind.remedy}* "
        f"| {', '.join(f'`{name}`' for name in kind.members)} |"
        for kind in KINDS.values()
    ]
    members = [f"| `{name}` | {text} |" for name, text in (ALWAYS | SOMETIMES | MEMBERS).items()]
    return "\n".join(
        [
            _INTRO,
            "| Slug | Status | Title | What it means, *what to do* | Members |",
            "| --- | --- | --- | --- | --- |",
            *kinds,
            "",
            "## Members",
            "",
            f"Every body has {', '.join(f'`{name}`' for name in ALWAYS)}; `instance` is there wherever the",
            "server knew it.",
            "",
            "| Member | What it says |",
            "| --- | --- |",
            *members,
            "",
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(markdown())
