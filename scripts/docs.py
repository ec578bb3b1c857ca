"""Fill the generated tables of docs/: `python scripts/docs.py`; with `--check`, say which are out of date.

The prose lives in the Markdown files. A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from cobatch.server.http.problem_kinds import ALWAYS, KINDS, MEMBERS, SOMETIMES
from cobatch.server.observability.metric_families import FAMILIES, Family

DOCS = Path(__file__).resolve().parent.parent / "docs"
_TABLE = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _metric(family: Family) -> list[str]:
    suffix = {"counter": "_total", "info": "_info"}.get(family.kind, "")
    labels = ", ".join(f"`{label}`" for label in family.labels)
    watch = f" *{family.watch}*" if family.watch else ""
    return [f"`{family.name}{suffix}`", family.kind, labels, f"{family.help}{watch}"]


def metrics() -> str:
    """Return the table of metric families."""
    return _table(["Name", "Kind", "Labels", "Meaning, *what to look for*"], [_metric(f) for f in FAMILIES])


def problems() -> str:
    """Return the table of problem kinds."""
    rows = [
        [
            f"`{kind.slug}`",
            str(kind.status),
            kind.title,
            f"{kind.meaning} *{kind.remedy}*",
            ", ".join(f"`{name}`" for name in kind.members),
        ]
        for kind in KINDS.values()
    ]
    return _table(["Slug", "Status", "Title", "Meaning, *what to do*", "Members"], rows)


def members() -> str:
    """Return the table of the members of a problem's body."""
    texts = ALWAYS | SOMETIMES | MEMBERS
    return _table(["Member", "Meaning"], [[f"`{name}`", text] for name, text in texts.items()])


TABLES: dict[str, Callable[[], str]] = {
    "metrics": metrics,
    "problems": problems,
    "problem-members": members,
}


def filled(text: str) -> str:
    """Return a page with its tables made anew."""
    return _TABLE.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def stale(folder: Path = DOCS) -> dict[Path, str]:
    """Return the pages whose tables are out of date, with their new text."""
    pages = {path: (path.read_text(), filled(path.read_text())) for path in sorted(folder.rglob("*.md"))}
    return {path: new for path, (old, new) in pages.items() if new != old}


def main() -> int:
    """Exit status 1 with `--check` where a table is out of date."""
    pages = stale()
    if "--check" in sys.argv[1:]:
        for path in pages:
            print(f"{path}: out of date; run python scripts/docs.py")
        return 1 if pages else 0
    for path, text in pages.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
