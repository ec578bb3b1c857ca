"""`cobatch bench`: load on a server, ours or another.

Registered by server/cli/__init__.py. What it runs is imported when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cobatch.server.console import end

_ARRIVALS = "poisson|constant|bursty|diurnal|FILE"


def bench(
    context: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="http://HOST:PORT[/v2/models/NAME]")],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which model (default: the only one).")
    ] = None,
    model_version: Annotated[str | None, typer.Option(metavar="VERSION")] = None,
    rate: Annotated[
        str | None,
        typer.Option(metavar="PER_S", help="Open loop: requests per second; several with commas, in turn."),
    ] = None,
    arrivals: Annotated[
        str, typer.Option(metavar=_ARRIVALS, help="When they leave; or a trace: seconds[,rows[,tenant]].")
    ] = "poisson",
    connections: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Closed loop: callers, 16; open loop: at most so many, 512."),
    ] = None,
    find_capacity: Annotated[
        bool, typer.Option("--find-capacity", help="Search for the highest rate that holds --slo-ms.")
    ] = False,
    slo_ms: Annotated[float | None, typer.Option(metavar="MS", help="What p99 must not exceed.")] = None,
    trials: Annotated[int, typer.Option(metavar="N", min=1, help="To confirm a capacity with.")] = 5,
    seconds: Annotated[
        float | None, typer.Option(metavar="S", help="To measure for, of each rate (10; a trace: all).")
    ] = None,
    warmup_s: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="Before that (1; a trace: 0).")
    ] = None,
    processes: Annotated[int, typer.Option(metavar="N", min=1, help="That send.")] = 1,
    binary: Annotated[bool, typer.Option("--binary", help="Tensors in binary, both ways.")] = False,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Of each request.")] = 1,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="INPUT=SIZE,...", help="Variable axes; SIZE may be LOW:HIGH.")
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option(metavar="INPUT=LOW:HIGH", help="Range of what is drawn (integers: 0:99)."),
    ] = None,
    examples: Annotated[int, typer.Option(metavar="N", min=1, help="Inputs to draw, sent in turn.")] = 16,
    input_: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="INPUT=FILE.npy|FILE.jsonl", help="Inputs from files instead."),
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="OUTPUT=FILE.npy|FILE.jsonl|URL", help="Right answers, to check all against."),
    ] = None,
    rtol: Annotated[float, typer.Option(metavar="R", min=0, help="How near is right.")] = 1e-3,
    atol: Annotated[float, typer.Option(metavar="A", min=0)] = 1e-5,
    token: Annotated[
        str | None, typer.Option(envvar="COBATCH_BENCH_TOKEN", metavar="TOKEN", help="Bearer token.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(metavar="FILE", help="The same, from a file.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="COBATCH_BENCH_API_KEY", metavar="KEY", help="For X-API-Key.")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option(metavar="'NAME: VALUE'", help="One more header.")
    ] = None,
    tenant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,...",
            help="name, share, rows, priority, deadline_ms, token_file, api_key_file.",
        ),
    ] = None,
    priority: Annotated[int, typer.Option(metavar="N", min=0, help="Of each request; 1 is the highest.")] = 0,
    deadline_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="Of each request (V2's timeout); later is not good.")
    ] = None,
    timeout_s: Annotated[float, typer.Option(metavar="S", help="To wait for an answer.")] = 30.0,
    ca_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Who vouches for the server.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Do not ask who the server is.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Same seed, same load.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="All figures.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="A page with charts.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, the report only.")] = False,
) -> None:
    """Put load on a server of the Open Inference Protocol V2, and say what came of it.

    With --rate requests leave when they should, whatever comes back, and latencies count from then; without,
    each connection asks again when it was answered. Ends with status 1 if an answer was wrong or none came.
    docs/bench.md has examples.
    """
    from cobatch.server.loadtest.errors import BenchError, UsageError
    from cobatch.server.loadtest.live import Progress
    from cobatch.server.loadtest.options import read
    from cobatch.server.loadtest.runner import run

    for file in (json_file, html_file):
        if file is not None and not file.parent.is_dir():
            raise end(f"{file.parent}: there is no such folder", 2)
    try:
        report = run(read(context.params), Progress(quiet))
    except UsageError as error:
        raise end(str(error), 2) from None
    except BenchError as error:
        raise end(str(error), 1) from None
    from cobatch.server.loadtest.document import as_html, as_json, show_report

    show_report(report)
    try:
        if json_file is not None:
            json_file.write_text(as_json(report))
        if html_file is not None:
            html_file.write_text(as_html(report))
    except OSError as error:
        raise end(f"{error.filename}: {error.strerror}", 1) from None
    if report.bad:
        raise typer.Exit(1)
