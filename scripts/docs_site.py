"""A hook of mkdocs: benchmarks/results is part of the site; other links out of docs/ become plain text.

`mkdocs build` reads it by its name in mkdocs.yml.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_OUTSIDE = re.compile(r"(?<!!)\[([^\]]*)\]\((?:\.\./)+[^)]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and plots of benchmarks/results under results/."""
    for path in sorted(RESULTS.rglob("*")):
        if path.suffix in {".md", ".svg"}:
            name = f"results/{path.relative_to(RESULTS).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links lead to where the site has their targets."""
    return _OUTSIDE.sub(r"\1", markdown.replace("../benchmarks/results/", "results/"))
