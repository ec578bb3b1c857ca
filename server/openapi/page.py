"""GET /docs: the OpenAPI document as one HTML page, without scripts or resources of other servers."""

import base64
import hashlib
import json
import shlex
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from cobatch.server.openapi.document import ANYWHERE, GUARDED, operations_in

Json = dict[str, Any]

_STYLE = Path(__file__).with_name("page.css").read_text()
_PAGE = Template(Path(__file__).with_name("page.html").read_text())
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)

# The header in the examples, by security scheme.
_CREDENTIALS = {"bearer": "Authorization: Bearer $TOKEN", "apiKey": "X-API-Key: $API_KEY"}
_PROBLEM = "application/problem+json"
_RANGES = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
# Longer examples are cut.
_EXAMPLE_LIMIT = 1200
_WIDTH = 76


def render(document: Json) -> str:
    """Return the whole page."""
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    schemas = document["components"]["schemas"].items()
    return _PAGE.substitute(
        title=title,
        style=_STYLE,
        navigation="".join(_navigation(document, tag) for tag in document["tags"]),
        description=_text(info["description"]),
        anywhere=", ".join(map(_problem, ANYWHERE)),
        access=_access(document),
        groups="".join(_group(document, tag) for tag in document["tags"]),
        schemas="".join(_schema(name, schema) for name, schema in schemas),
    )


def _access(document: Json) -> str:
    """Return the section about authentication, or "" where the server has none."""
    schemes = document["components"].get("securitySchemes")
    if not schemes:
        return ""
    ways = "".join(
        f"<dt><code>{_CREDENTIALS[name]}</code></dt><dd>{escape(scheme['description'])}</dd>"
        for name, scheme in schemes.items()
    )
    problems = [slug for slug in GUARDED if slug in document["components"]["examples"]]
    return (
        '<h2 id="access">Authentication</h2><p>Send exactly one of these headers with each request that '
        f"needs credentials. <code>$TOKEN</code> and <code>$API_KEY</code> are yours.</p><dl>{ways}</dl>"
        f"<p>On any path that needs credentials: {', '.join(map(_problem, problems))}.</p>\n"
    )


def _operations(document: Json, tag: str) -> list[tuple[str, str, Json]]:
    """Return path, method and operation; an operation with several paths comes once."""
    return [one for one in operations_in(document) if tag in one[2]["tags"] and "x-twin-of" not in one[2]]


def _navigation(document: Json, tag: Json) -> str:
    items = "".join(
        f'<li><a href="#{operation["operationId"]}"><span class="m {method}">{method.upper()}</span>'
        f"<span>{escape(operation['summary'])}</span></a></li>"
        for _, method, operation in _operations(document, tag["name"])
    )
    return f"<strong>{escape(tag['name'])}</strong><ul>{items}</ul>"


def _group(document: Json, tag: Json) -> str:
    head = f'<h2>{escape(tag["name"])}</h2><p class="soft">{_text(tag["description"])}</p>'
    return head + "".join(_operation(document, *each) for each in _operations(document, tag["name"]))


def _operation(document: Json, path: str, method: str, operation: Json) -> str:
    id_ = operation["operationId"]
    twins = [twin for twin, _, other in operations_in(document) if other.get("x-twin-of") == id_]
    parts = [
        f'<section class="op" id="{id_}"><h3><span class="m {method}">{method.upper()}</span>',
        f'<a href="#{id_}"><code>{escape(path)}</code></a></h3>',
        f"<p><b>{escape(operation['summary'])}.</b> {_text(operation['description'])}</p>",
        *[f'<p class="soft">Also <code>{escape(twin)}</code></p>' for twin in twins],
    ]
    if parameters := operation.get("parameters"):
        parts.append(f"<h4>Parameters</h4><dl>{''.join(map(_parameter, parameters))}</dl>")
    credentials = ""
    if "security" in operation:
        scheme = next(iter(document["components"]["securitySchemes"]))
        # In double quotes, so that the shell inserts the variable's value.
        credentials = f' -H "{_CREDENTIALS[scheme]}"'
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<h4>Body: <code>{media}</code></h4><p>{_type(content['schema'])}</p>")
        parts += [
            _details(example["summary"], _command(path, media, example, credentials))
            for example in content.get("examples", {}).values()
        ]
    responses = operation["responses"].items()
    parts += [_response(status, one) for status, one in responses if status < "300"]
    if refusals := "".join(_refusal(status, one) for status, one in responses if status >= "300"):
        parts.append(f'<h4>Errors</h4><dl class="pairs">{refusals}</dl>')
    return "".join([*parts, "</section>\n"])


def _parameter(parameter: Json) -> str:
    place = parameter["in"] + ("" if parameter.get("required") else ", optional")
    return (
        f'<dt><code>{escape(parameter["name"])}</code> <span class="soft">{place}</span></dt>'
        f'<dd>{_text(parameter["description"])} <span class="soft">{_type(parameter["schema"])}</span></dd>'
    )


def _response(status: str, response: Json) -> str:
    parts = [f"<h4>Response {status}</h4><p>{_text(response['description'])}</p>"]
    for media, content in response["content"].items():
        parts.append(f"<p><code>{media}</code>: {_type(content['schema'])}</p>")
        if "example" in content:
            parts.append(_details("Example", _pretty(content["example"])))
    if "headers" in response:
        names = ", ".join(f"<code>{escape(name)}</code>" for name in response["headers"])
        parts.append(f"<p>Headers: {names}</p>")
    return "".join(parts)


def _refusal(status: str, response: Json) -> str:
    slugs = response["content"].get(_PROBLEM, {}).get("examples", {})
    kinds = [_problem(slug) for slug in slugs if slug not in (*ANYWHERE, *GUARDED)]
    if own := response["content"].get("application/json"):
        kinds.insert(0, f"{_type(own['schema'])}: {_text(response['description'].partition(' Or: ')[0])}")
    return f"<dt>{status}</dt><dd>{', '.join(kinds)}</dd>" if kinds else ""


def _problem(slug: str) -> str:
    return f'<a href="problems/{slug}"><code>{slug}</code></a>'


def _schema(name: str, schema: Json) -> str:
    required = schema.get("required", [])
    fields = "".join(
        f'<dt><code>{escape(field)}</code> <span class="soft">{_type(one)}'
        f"{'' if field in required else ', optional'}</span></dt>"
        f"<dd>{_text(one.get('description', ''))}</dd>"
        for field, one in schema.get("properties", {}).items()
    )
    head = f'<section class="schema" id="schema-{name}"><h3><a href="#schema-{name}">{name}</a></h3>'
    return f"{head}<p>{_text(schema.get('description', ''))}</p><dl>{fields}</dl></section>\n"


def _type(schema: Json) -> str:
    """Return a schema in a few words, as HTML."""
    match schema:
        case {"$ref": target}:
            name = target.rpartition("/")[2]
            return f'<a href="#schema-{name}">{name}</a>'
        case {"anyOf": options}:
            return " or ".join(_titled(option) for option in options)
        case {"allOf": [first, *_]}:
            return _type(first)
        case {"enum": values}:
            return "one of " + ", ".join(f"<code>{escape(str(value))}</code>" for value in values)
        case {"const": value}:
            return f"<code>{escape(str(value))}</code>"
        case {"type": "array", "items": dict(items)}:
            return f"list of {_titled(items)}"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"map of {_titled(values)}"
        case {"type": "object", "properties": dict(fields)} if fields:
            return ", ".join(f"<code>{escape(name)}</code>: {_titled(one)}" for name, one in fields.items())
        case {"format": "binary"}:
            return "bytes"
        case {"type": kind}:
            limits = ", ".join(f"{words} {schema[key]}" for key, words in _RANGES.items() if key in schema)
            name = kind if isinstance(kind, str) else " or ".join(kind)
            return escape(name) + (f" ({limits})" if limits else "")
        case _:
            return "anything"


def _titled(schema: Json) -> str:
    return escape(schema["title"]) if "title" in schema else _type(schema)


def _text(text: str) -> str:
    """Return text with `code` in it as HTML."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if odd % 2 else piece for odd, piece in enumerate(pieces))


def _command(path: str, media: str, example: Json, credentials: str) -> str:
    """Return a request as a shell command. A binary body is text, followed by zeros."""
    value = example["value"]
    curl = f"curl $URL{path.format_map(example.get('x-path', {}))}{credentials}"
    if media == "application/json":
        return f"{curl} \\\n  --json {shlex.quote(_pretty(value))}"
    if media == "multipart/form-data":
        parts = [f"-F {shlex.quote(f'{name}={_pretty(part)}')}" for name, part in value.items()]
        return " \\\n  ".join([curl, *parts])
    text = value.rstrip("\0")
    sources = [f"printf %s {shlex.quote(text)}"] if text else []
    sources += [f"head -c {zeros} /dev/zero"] if (zeros := len(value) - len(text)) else []
    headers = {"Content-Type": media, **example.get("x-headers", {})}
    lines = [f"-H {shlex.quote(f'{name}: {header}')}" for name, header in headers.items()]
    command = " \\\n  ".join([f"{curl} --data-binary @- -o answer", *lines])
    return f"{{ {'; '.join(sources)}; }} |\n  {command}"


def _details(summary: str, text: str) -> str:
    """Return text that is shown on a click."""
    if len(text) > _EXAMPLE_LIMIT:
        text = text[:_EXAMPLE_LIMIT] + " ..."
    # An element that scrolls must be reachable by keyboard.
    body = f'<pre tabindex="0"><code>{escape(text)}</code></pre>'
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _pretty(value: Any, indent: int = 0) -> str:
    """Return JSON with long values on several lines and short ones on one."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) + indent <= _WIDTH or not isinstance(value, dict | list):
        return text
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_pretty(one, indent + 2)}" for key, one in value.items()]
    else:
        items = [_pretty(one, indent + 2) for one in value]
    ends = "{}" if isinstance(value, dict) else "[]"
    lead = "\n" + " " * (indent + 2)
    return f"{ends[0]}{lead}{f',{lead}'.join(items)}\n{' ' * indent}{ends[1]}"
