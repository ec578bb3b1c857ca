"""Write the generated parts of docs/: `python scripts/docs.py`; with `--check`, say which are out of date.

They are the tables in the Markdown files, each between `<!-- table: NAME -->` and `<!-- end -->`, and the
JSON schema of the configuration file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cobatch.server.http.problem import ALWAYS, KINDS, MEMBERS, SOMETIMES
from cobatch.server.observability.metric_families import FAMILIES, FUNCTION_FAMILIES, Family
from cobatch.server.settings.auth import AuthSettings, Issuer, ModelRule, TenantRule
from cobatch.server.settings.describe import Setting, settings_of
from cobatch.server.settings.schema import (
    FILE_ONLY,
    ModelSettings,
    PadSettings,
    PipelineSettings,
    ServerSettings,
    Settings,
    env_name,
    flag_name,
)

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


def metrics(families: Sequence[Family] = FAMILIES) -> str:
    """Return a table of metric families."""
    return _table(["Name", "Kind", "Labels", "Meaning, *what to look for*"], [_metric(f) for f in families])


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


def _default(setting: Setting) -> str:
    if setting.computed:
        return setting.computed
    if setting.default is msgspec.NODEFAULT:
        return "required"
    return "" if setting.default in (None, "", (), {}) else f"`{json.dumps(setting.default)}`"


def _flags(setting: Setting) -> list[str]:
    if setting.name in FILE_ONLY:
        return ["", ""]
    if setting.name == "path":
        return ["`MODEL`", f"`{env_name('model')}`"]
    flag = flag_name(setting.name)
    negated = f", `--no-{flag[2:]}`" if setting.is_switch else ""
    return [f"`{flag}`{negated}", f"`{env_name(setting.name)}`"]


def settings(struct: type[msgspec.Struct], *, flags: bool = False) -> str:
    """Return the table of a struct's settings."""
    heads = ["Setting", "Type", "Default", *(["Flag", "Variable"] if flags else []), "Meaning"]
    rows = [
        [
            f"`{setting.name}`",
            re.sub(r"^an? (?=integer|number)| that is not empty", "", setting.type),
            _default(setting),
            *(_flags(setting) if flags else []),
            setting.help[0].upper() + setting.help[1:],
        ]
        for setting in settings_of(struct).values()
    ]
    return _table(heads, [[cell.replace("|", "\\|") for cell in row] for row in rows])


def schema() -> str:
    """Return the JSON schema of the configuration file, for editors."""
    document = {"$schema": "http://json-schema.org/draft-07/schema#"} | msgspec.json.schema(Settings)
    parts = document["$defs"]
    for struct in STRUCTS:
        part = parts[struct.__name__]
        part["description"] = re.split(r"\.\s", part["description"])[0].rstrip(".") + "."
        if one_of := getattr(struct, "ONE_OF", ()):
            part["anyOf"] = [{"required": [name]} for name in one_of]
        for setting in settings_of(struct).values():
            member = _without_null(part["properties"][setting.name])
            if setting.computed:
                member["description"] += f" (default: {setting.computed})"
                member.pop("default", None)
            if setting.may_be_text:
                member["type"] = ["array", "string"]
            part["properties"][setting.name] = member
    parts["Settings"] |= {"title": "cobatch", "description": "Settings of `cobatch serve`.", "required": []}
    # An end of text that JavaScript's expressions, which JSON schema has, know too.
    return json.dumps(document, indent=2).replace("\\\\Z", "$") + "\n"


def _without_null(member: dict[str, Any]) -> dict[str, Any]:
    """Drop what msgspec says about None, which TOML has not."""
    if member.get("default", ...) is None:
        del member["default"]
    choices = [choice for choice in member.get("anyOf", []) if choice != {"type": "null"}]
    if len(choices) == 1:
        del member["anyOf"]
        return {**choices[0], **member}
    return member | ({"anyOf": choices} if choices else {})


STRUCTS = (
    Settings, ServerSettings, ModelSettings, PadSettings, PipelineSettings, AuthSettings, Issuer, TenantRule,
    ModelRule,
)  # fmt: skip
TABLES: dict[str, Callable[[], str]] = {
    "metrics": metrics,
    "function-metrics": lambda: metrics(FUNCTION_FAMILIES),
    "problems": problems,
    "problem-members": members,
    "settings-server": lambda: settings(ServerSettings, flags=True),
    "settings-models": lambda: settings(ModelSettings, flags=True),
    "settings-pad": lambda: settings(PadSettings),
    "settings-pipelines": lambda: settings(PipelineSettings),
    "settings-auth": lambda: settings(AuthSettings),
    "settings-issuers": lambda: settings(Issuer),
    "settings-tenants": lambda: settings(TenantRule),
    "settings-model-rules": lambda: settings(ModelRule),
}


def filled(text: str) -> str:
    """Return a page with its tables made anew."""
    return _TABLE.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def stale(folder: Path = DOCS) -> dict[Path, str]:
    """Return the files that are out of date, with their new text."""
    new = {path: filled(path.read_text()) for path in sorted(folder.rglob("*.md"))}
    new[folder / "cobatch.schema.json"] = schema()
    return {path: text for path, text in new.items() if not path.exists() or path.read_text() != text}


def main() -> int:
    """Return exit status 1 with `--check` if a file is out of date."""
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
