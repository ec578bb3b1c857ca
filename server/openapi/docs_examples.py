"""The examples on the API's page: requests as commands that can be pasted, answers as JSON."""

from __future__ import annotations

import json
import shlex
from html import escape
from typing import Any

Json = dict[str, Any]

# Longer examples are cut: they are there to be read.
_MOST_SHOWN = 1200
_WIDTH = 76


def request_example(path: str, media: str, example: Json, credentials: str = "") -> str:
    """A request as a command, where a command line can hold it. `credentials` is a header of it."""
    value = example["value"]
    path = path.format_map(example.get("x-path", {}))
    if media == "application/json":
        body = f"--json {shlex.quote(pretty(value))}"
    elif media == "multipart/form-data":
        body = " \\\n  ".join(f"-F {shlex.quote(f'{name}={pretty(part)}')}" for name, part in value.items())
    else:
        return details(example["summary"], _binary(path, media, example, credentials))
    return details(example["summary"], f"curl $URL{path}{_line(credentials)} \\\n  {body}")


def _binary(path: str, media: str, example: Json, credentials: str) -> str:
    """A binary body as a command: text, then zeros."""
    text = example["value"].rstrip("\0")
    zeros = len(example["value"]) - len(text)
    parts = [f"printf %s {shlex.quote(text)}"] if text else []
    parts += [f"head -c {zeros} /dev/zero"] if zeros else []
    headers = {"Content-Type": media, **example.get("x-headers", {})}
    lines = " \\\n  ".join(f"-H {shlex.quote(f'{name}: {value}')}" for name, value in headers.items())
    curl = f"curl $URL{path}{_line(credentials)}"
    return f"{{ {'; '.join(parts)}; }} |\n  {curl} --data-binary @- -o answer \\\n  {lines}"


def _line(credentials: str) -> str:
    # In double quotes, for the shell puts the variable's value in.
    return f' -H "{credentials}"' if credentials else ""


def details(summary: str, text: str) -> str:
    """Text that is shown when it is asked for."""
    if len(text) > _MOST_SHOWN:
        text = text[:_MOST_SHOWN] + " ..."
    # What can be scrolled must be reachable by keyboard.
    body = f'<pre tabindex="0"><code>{escape(text)}</code></pre>'
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def pretty(value: Any, indent: int = 0) -> str:
    """JSON on several lines where it is long, but what is short stays on one."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) + indent <= _WIDTH or not isinstance(value, dict | list):
        return text
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {pretty(one, indent + 2)}" for key, one in value.items()]
    else:
        items = [pretty(one, indent + 2) for one in value]
    ends = "{}" if isinstance(value, dict) else "[]"
    lead = "\n" + " " * (indent + 2)
    return f"{ends[0]}{lead}{f',{lead}'.join(items)}\n{' ' * indent}{ends[1]}"
