"""Open pages, as HTML if `Accept` has it, else text: GET / leads to the others, /problems explains errors."""

from html import escape
from pathlib import Path
from string import Template

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch.server.api.routing import guarded
from cobatch.server.http.problem import ALWAYS, KINDS, MEMBERS, SOMETIMES, Kind, Problem
from cobatch.server.inference.service import Inference

_FOLDER = Path(__file__).parent
_PAGE, _KIND = (Template((_FOLDER / name).read_text()) for name in ("page.html", "problem.html"))
_INDEX_HTML, _INDEX_TEXT = ((_FOLDER / name).read_text() for name in ("index.html", "index.txt"))
_HEADERS = {
    # Nothing that a client sent is on the pages, so a style without a hash is safe.
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
    "x-content-type-options": "nosniff",
    "vary": "accept",
}


def page_routes(inference: Inference) -> list[Route]:
    """Return the routes, for Starlette."""

    async def index(request: Request) -> Response:
        return _page(request, "cobatch", _INDEX_HTML, _INDEX_TEXT)

    async def problems(request: Request) -> Response:
        return _page(request, "Problems", _problems_html(), _problems_text())

    async def problem(request: Request) -> Response:
        slug = request.path_params["slug"]
        kind = KINDS.get(slug)
        if kind is None:
            raise Problem("not-found", f"there is no problem {slug!r}; GET /problems lists them")
        members = ALWAYS | SOMETIMES | {name: MEMBERS[name] for name in kind.members}
        return _page(request, kind.title, _kind_html(kind, members), _kind_text(kind, members))

    paths = {"/": index, "/problems": problems, "/problems/{slug}": problem}
    return [Route(path, guarded(inference, "open", page), methods=["GET"]) for path, page in paths.items()]


def _page(request: Request, title: str, body: str, text: str) -> Response:
    if "text/html" not in request.headers.get("accept", ""):
        return Response(text, media_type="text/plain", headers=_HEADERS)
    page = _PAGE.substitute(title=escape(title), body=body)
    return Response(page, media_type="text/html", headers=_HEADERS)


def _problems_text() -> str:
    width = max(map(len, KINDS))
    lines = [f"{kind.status}  {kind.slug:{width}}  {kind.title}\n" for kind in KINDS.values()]
    return f"{''.join(lines)}\nEach has a page: /problems/SLUG\n"


def _problems_html() -> str:
    items = [
        f'<dt>{kind.status} <a href="/problems/{kind.slug}"><code>{kind.slug}</code></a></dt>'
        f"<dd>{escape(kind.title)}</dd>\n"
        for kind in KINDS.values()
    ]
    return f"<h1>Problems</h1>\n<dl>{''.join(items)}</dl>"


def _kind_text(kind: Kind, members: dict[str, str]) -> str:
    lines = "\n".join(f"  {name}: {text}" for name, text in members.items())
    return (
        f"{kind.status} {kind.slug}: {kind.title}\n\n{kind.meaning}\n\nWhat to do: {kind.remedy}\n\n"
        f"Members of the body:\n{lines}\n"
    )


def _kind_html(kind: Kind, members: dict[str, str]) -> str:
    items = [f"<dt><code>{name}</code></dt><dd>{escape(text)}</dd>\n" for name, text in members.items()]
    texts = {name: escape(str(value)) for name, value in msgspec.structs.asdict(kind).items()}
    return _KIND.substitute(texts, members="".join(items))
