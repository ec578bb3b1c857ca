"""`cobatch bench`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cobatch.server.console import end
from cobatch.server.loadtest.options import BenchError, UsageError, read_options
from cobatch.server.loadtest.page import as_html
from cobatch.server.loadtest.report import Progress, show
from cobatch.server.loadtest.runner import run

_ARRIVALS = "poisson|constant|bursty|diurnal|FILE"


def bench(
    context: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="http://HOST:PORT[/v2/models/NAME]")],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Model to load (default: the only one).")
    ] = None,
    model_version: Annotated[str | None, typer.Option(metavar="VERSION")] = None,
    rate: Annotated[
        str | None,
        typer.Option(metavar="PER_S", help="Open loop: requests per second; several, separated by commas."),
    ] = None,
    arrivals: Annotated[
        str, typer.Option(metavar=_ARRIVALS, help="Arrival process, or a trace: seconds[,rows[,tenant]].")
    ] = "poisson",
    connections: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Closed loop: clients (16); open loop: limit (512)."),
    ] = None,
    find_capacity: Annotated[
        bool, typer.Option("--find-capacity", help="Search for the highest rate that holds --slo-ms.")
    ] = False,
    slo_ms: Annotated[float | None, typer.Option(metavar="MS", help="Limit of p99.")] = None,
    trials: Annotated[int, typer.Option(metavar="N", min=1, help="Trials that confirm a capacity.")] = 5,
    seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Measured time for each rate (10; a trace: all of it).")
    ] = None,
    warmup_s: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="Warm-up before measuring (1; a trace: 0).")
    ] = None,
    processes: Annotated[int, typer.Option(metavar="N", min=1, help="Generator processes.")] = 1,
    binary: Annotated[bool, typer.Option("--binary", help="Binary tensors in both directions.")] = False,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Rows of each request.")] = 1,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="INPUT=SIZE,...", help="Variable axes; SIZE may be LOW:HIGH.")
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option(metavar="INPUT=LOW:HIGH", help="Range of random values (integers: 0:99)."),
    ] = None,
    examples: Annotated[int, typer.Option(metavar="N", min=1, help="Random inputs, sent in rotation.")] = 16,
    input_: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="INPUT=FILE.npy|FILE.jsonl", help="Inputs from files instead."),
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="OUTPUT=FILE.npy|FILE.jsonl|URL", help="Expected answers to check against."),
    ] = None,
    rtol: Annotated[float, typer.Option(metavar="R", min=0, help="Relative tolerance.")] = 1e-3,
    atol: Annotated[float, typer.Option(metavar="A", min=0, help="Absolute tolerance.")] = 1e-5,
    token: Annotated[
        str | None, typer.Option(envvar="COBATCH_BENCH_TOKEN", metavar="TOKEN", help="Bearer token.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(metavar="FILE", help="The same, from a file.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="COBATCH_BENCH_API_KEY", metavar="KEY", help="For X-API-Key.")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option(metavar="'NAME: VALUE'", help="Additional header.")
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
        float | None, typer.Option(metavar="MS", help="Deadline of each request (V2's timeout).")
    ] = None,
    timeout_s: Annotated[float, typer.Option(metavar="S", help="Longest wait for an answer.")] = 30.0,
    ca_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CA certificates to verify the server with.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Do not verify the server's certificate.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Equal seeds send equal loads.")] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all results as JSON.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with charts.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show the report only, no progress.")] = False,
) -> None:
    """Load a server of the Open Inference Protocol V2 and report throughput, latency and errors.

    With --rate requests are sent at scheduled times, however slow the answers, and latencies count from those
    times; without it, each connection sends its next request after an answer. The exit status is 1 if an
    answer was wrong or none arrived. See docs/bench.md for examples.
    """
    for file in (json_file, html_file):
        if file is not None and not file.parent.is_dir():
            raise end(f"{file.parent}: no such folder", 2)
    try:
        report = run(read_options(context.params), Progress(quiet))
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
