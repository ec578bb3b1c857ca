"""The style of the API's page: light and dark, narrow and wide, nothing from elsewhere.

GET /docs: the OpenAPI document as one page of HTML. No script, nothing from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape
from typing import Any

from cobatch.server.openapi.document import ANYWHERE, GUARDED
from cobatch.server.openapi.examples import details, pretty, request_example

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#59636e;--line:#d8dee4;--box:#f5f7f9;
--link:#0b57d0;--get:#0a6b3d;--post:#0b57d0;--delete:#b3261e}
@media(prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e4e7ea;--soft:#9aa4af;--line:#333a42;
--box:#1e2328;--link:#8ab4f8;--get:#7bd3a3;--post:#8ab4f8;--delete:#f2a29b}}
*{box-sizing:border-box}
html{scroll-padding-top:1rem}
body{margin:0;font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
color:var(--fg);background:var(--bg)}
a{color:var(--link);text-decoration-thickness:1px;text-underline-offset:2px}
:focus-visible{outline:2px solid var(--link);outline-offset:2px;border-radius:3px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.5rem;background:var(--bg);
padding:.3rem .6rem;z-index:1}
code,pre{font:.875em/1.5 ui-monospace,SFMono-Regular,Menlo,monospace}
code{overflow-wrap:anywhere}
pre{background:var(--box);border:1px solid var(--line);border-radius:6px;padding:.7rem .9rem;margin:.4rem 0;
overflow-x:auto;max-height:24rem;white-space:pre-wrap;overflow-wrap:anywhere}
main{max-width:52rem;padding:1.5rem 1rem 4rem;margin:0 auto}
h1{font-size:1.8rem;margin:0}h2{font-size:1.35rem;margin:3rem 0 .3rem}h4{font-size:1rem;margin:1.2rem 0 .2rem}
h3{font-size:1.05rem;margin:0;display:flex;flex-wrap:wrap;gap:.2rem .7rem;align-items:baseline}
h3 a{color:inherit;text-decoration:none}h3 a:hover{text-decoration:underline}
p{margin:.4rem 0}.soft{color:var(--soft)}
.op,.schema{border-top:1px solid var(--line);padding:1.2rem 0;margin-top:1.2rem}
.m{font:600 .8rem/1.6 ui-monospace,monospace}
.get{color:var(--get)}.post{color:var(--post)}.delete{color:var(--delete)}
dl{margin:.3rem 0}dt{margin-top:.6rem}dd{margin:0 0 0 1.2rem;overflow-wrap:anywhere}
.pairs{display:grid;grid-template-columns:3rem minmax(0,1fr);gap:.2rem .5rem}.pairs dt,.pairs dd{margin:0}
details{margin:.3rem 0}summary{cursor:pointer;padding:.15rem 0}
nav ul{list-style:none;margin:.2rem 0 1rem;padding:0}nav li{margin:.15rem 0}
nav a{display:flex;gap:.5rem;text-decoration:none;color:var(--fg);font-size:.86rem;padding:.1rem 0}
nav a:hover{text-decoration:underline}nav .m{font-size:.68rem;min-width:3.2rem;line-height:1.9}
nav ul{columns:10.5rem}nav li{break-inside:avoid}nav strong{font-size:.86rem}
nav{border-bottom:1px solid var(--line);padding:1rem;background:var(--box)}
@media(min-width:64rem){
body{display:grid;grid-template-columns:19rem minmax(0,1fr)}
nav ul{columns:auto}
nav{border:0;border-right:1px solid var(--line);position:sticky;top:0;height:100vh;overflow-y:auto}
main{margin:0;padding:2rem 3rem 5rem}}
"""


Json = dict[str, Any]

_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)

# What a request shows for each of the schemes.
_CREDENTIALS = {"bearer": "Authorization: Bearer $TOKEN", "apiKey": "X-API-Key: $API_KEY"}


def render(document: Json) -> str:
    """The whole page."""
    info = document["info"]
    title = f"{info['title']} {info['version']}"
    groups = [_group(document, tag) for tag in document["tags"]]
    schemas = [_schema(name, schema) for name, schema in document["components"]["schemas"].items()]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: API</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>"
        '<a class="skip" href="#main">To the content</a>\n'
        f"{_navigation(document)}\n"
        f'<main id="main"><h1>{escape(title)}</h1><p>{_text(info["description"])}</p>'
        f"<p>On any path: {', '.join(map(_kind, ANYWHERE))}.</p>"
        '<p>This page is <a href="openapi.json">openapi.json</a> for people; '
        'all <a href="problems">problems</a> have pages of their own. In the commands, '
        "<code>$URL</code> is where the server is: <code>URL=http://127.0.0.1:8000</code>.</p>\n"
        f"{_access(document)}"
        f'{"".join(groups)}\n<h2 id="schemas">Schemas</h2>{"".join(schemas)}</main></body></html>\n'
    )


def _scheme(document: Json) -> str:
    """The way to authenticate that examples show."""
    return str(next(iter(document["components"]["securitySchemes"])))


def _access(document: Json) -> str:
    """How to authenticate, where the server asks for it."""
    schemes = document["components"].get("securitySchemes")
    if not schemes:
        return ""
    ways = "".join(
        f"<dt><code>{_CREDENTIALS[name]}</code></dt><dd>{escape(scheme['description'])}</dd>"
        for name, scheme in schemes.items()
    )
    known = [slug for slug in GUARDED if slug in _slugs(document)]
    return (
        '<h2 id="access">Who may call</h2><p>One header, once, with each request but those that are open to '
        f"everybody. <code>$TOKEN</code> and <code>$API_KEY</code> are yours.</p><dl>{ways}</dl>"
        f"<p>On any path that is not open: {', '.join(map(_kind, known))}.</p>\n"
    )


def _slugs(document: Json) -> set[str]:
    """The kinds of problems that are an answer of some operation."""
    return {
        slug
        for methods in document["paths"].values()
        for operation in methods.values()
        for response in operation["responses"].values()
        for slug in response["content"].get("application/problem+json", {}).get("examples", {})
    }


def _operations(document: Json, tag: str) -> list[tuple[str, str, Json]]:
    return [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if tag in operation["tags"] and "x-twin-of" not in operation
    ]


def _twins(document: Json, id_: str) -> list[str]:
    """Other paths of the same operation."""
    return [
        path
        for path, methods in document["paths"].items()
        for operation in methods.values()
        if operation.get("x-twin-of") == id_
    ]


def _navigation(document: Json) -> str:
    parts = ['<nav aria-label="Operations">']
    for tag in document["tags"]:
        items = "".join(
            f'<li><a href="#{operation["operationId"]}"><span class="m {method}">{method.upper()}</span>'
            f"<span>{escape(operation['summary'])}</span></a></li>"
            for _, method, operation in _operations(document, tag["name"])
        )
        parts.append(f"<strong>{escape(tag['name'])}</strong><ul>{items}</ul>")
    return "".join([*parts, '<a href="#schemas">Schemas</a></nav>'])


def _group(document: Json, tag: Json) -> str:
    operations = [_operation(document, *each) for each in _operations(document, tag["name"])]
    about = f'<h2>{escape(tag["name"])}</h2><p class="soft">{_text(tag["description"])}</p>'
    return about + "".join(operations)


def _operation(document: Json, path: str, method: str, operation: Json) -> str:
    id_ = operation["operationId"]
    parts = [
        f'<section class="op" id="{id_}"><h3><span class="m {method}">{method.upper()}</span>',
        f'<a href="#{id_}"><code>{escape(path)}</code></a></h3>',
        f"<p><b>{escape(_sentence(operation['summary']))}</b> {_text(operation['description'])}</p>",
    ]
    parts += [f'<p class="soft">Also <code>{escape(twin)}</code></p>' for twin in _twins(document, id_)]
    parameters = operation.get("parameters", [])
    if parameters:
        parts.append(f"<h4>Parameters</h4><dl>{''.join(map(_parameter, parameters))}</dl>")
    credentials = _CREDENTIALS[_scheme(document)] if "security" in operation else ""
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<h4>Body: <code>{media}</code></h4><p>{_type(content['schema'])}</p>")
        examples = content.get("examples", {}).values()
        parts += [request_example(path, media, example, credentials) for example in examples]
    good = {status: one for status, one in operation["responses"].items() if status < "300"}
    bad = {status: one for status, one in operation["responses"].items() if status >= "300"}
    parts += [_response(status, one) for status, one in good.items()]
    refusals = "".join(_refusal(*each) for each in bad.items())
    if refusals:
        parts.append(f'<h4>Otherwise</h4><dl class="pairs">{refusals}</dl>')
    return "".join([*parts, "</section>\n"])


def _sentence(text: str) -> str:
    return text if text.endswith("?") else f"{text}."


def _parameter(parameter: Json) -> str:
    need = "" if parameter.get("required") else ", optional"
    return (
        f'<dt><code>{escape(parameter["name"])}</code> <span class="soft">{parameter["in"]}{need}</span></dt>'
        f'<dd>{_text(parameter["description"])} <span class="soft">{_type(parameter["schema"])}</span></dd>'
    )


def _response(status: str, response: Json) -> str:
    parts = [f"<h4>Answer {status}</h4><p>{_text(response['description'])}</p>"]
    for media, content in response["content"].items():
        parts.append(f"<p><code>{media}</code>: {_type(content['schema'])}</p>")
        if "example" in content:
            parts.append(details("Example", pretty(content["example"])))
    if "headers" in response:
        names = ", ".join(f"<code>{escape(name)}</code>" for name in response["headers"])
        parts.append(f"<p>Headers: {names}</p>")
    return "".join(parts)


def _refusal(status: str, response: Json) -> str:
    examples = response["content"].get("application/problem+json", {}).get("examples", {})
    kinds = [_kind(slug) for slug in examples if slug not in (*ANYWHERE, *GUARDED)]
    own = response["content"].get("application/json")
    if own:
        kinds.insert(0, f"{_type(own['schema'])}: {_text(response['description'].partition(' Or: ')[0])}")
    return f"<dt>{status}</dt><dd>{', '.join(kinds)}</dd>" if kinds else ""


def _kind(slug: str) -> str:
    return f'<a href="problems/{slug}"><code>{slug}</code></a>'


def _schema(name: str, schema: Json) -> str:
    head = f'<section class="schema" id="schema-{name}"><h3><a href="#schema-{name}">{name}</a></h3>'
    required = schema.get("required", [])
    fields = "".join(
        f'<dt><code>{escape(field)}</code> <span class="soft">{_type(one)}'
        f"{'' if field in required else ', optional'}</span></dt>"
        f"<dd>{_text(one.get('description', ''))}</dd>"
        for field, one in schema.get("properties", {}).items()
    )
    return f"{head}<p>{_text(schema.get('description', ''))}</p><dl>{fields}</dl></section>\n"


def _type(schema: Json) -> str:
    """A schema in a few words, as HTML."""
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
            return escape(kind if isinstance(kind, str) else " or ".join(kind)) + _range(schema)
        case _:
            return "anything"


def _titled(schema: Json) -> str:
    title = schema.get("title")
    return escape(title) if title else _type(schema)


def _range(schema: Json) -> str:
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    limits = [f"{words[key]} {schema[key]}" for key in words if key in schema]
    return f" ({', '.join(limits)})" if limits else ""


def _text(text: str) -> str:
    """Text with `code` in it, as HTML."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if odd % 2 else piece for odd, piece in enumerate(pieces))
