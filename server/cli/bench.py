"""`cobatch bench`. Its flags are the fields of `Options`, and those of the report."""

from dataclasses import fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer

from cobatch.server.console import end, option, switch
from cobatch.server.loadtest.options import BenchError, Options, UsageError
from cobatch.server.loadtest.page import as_html
from cobatch.server.loadtest.report import Progress, show
from cobatch.server.loadtest.runner import run


def bench(*, json_file: Path | None, html_file: Path | None, quiet: bool, **options: Any) -> None:
    """Load a server of the Open Inference Protocol V2 and report throughput, latency and errors.

    With --rate requests are sent at scheduled times, however slow the answers, and latencies count from those
    times; without it, each connection sends its next request after an answer. The exit status is 1 if an
    answer was wrong or none arrived. See docs/bench.md for examples.
    """
    for file in (json_file, html_file):
        if file is not None and not file.parent.is_dir():
            raise end(f"{file.parent}: no such folder", 2)
    try:
        given = {name: value for name, value in options.items() if value is not None}
        report = run(Options(**given), Progress(quiet))
    except UsageError as error:
        raise end(str(error), 2) from None
    except BenchError as error:
        raise end(str(error), 1) from None
    show(report)
    try:
        if json_file is not None:
            json_file.write_text(report.as_json())
        if html_file is not None:
            html_file.write_text(as_html(report))
    except OSError as error:
        raise end(f"{error.filename}: {error.strerror}", 1) from None
    if report.failed:
        raise typer.Exit(1)


def _parameter(name: str, kind: Any, default: object) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)


_JSON = option("FILE", "Write all results as JSON.", "--json")
_HTML = option("FILE", "Write a page with charts.", "--html")
bench.__signature__ = Signature(  # type: ignore[attr-defined]
    [
        Parameter("url", Parameter.KEYWORD_ONLY, annotation=Options.__annotations__["url"]),
        *(
            _parameter(field.name, field.type, field.default)
            for field in fields(Options)[1:]
            if get_origin(field.type) is Annotated
        ),
        _parameter("json_file", Annotated[Path | None, _JSON], None),
        _parameter("html_file", Annotated[Path | None, _HTML], None),
        _parameter("quiet", Annotated[bool, switch("--quiet", "Show the report only, no progress.")], False),
    ]
)
