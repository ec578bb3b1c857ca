"""`cobatch bench`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cobatch.server.console import end, option, switch
from cobatch.server.loadtest.options import BenchError, UsageError, read_options
from cobatch.server.loadtest.page import as_html
from cobatch.server.loadtest.report import Progress, show
from cobatch.server.loadtest.runner import run

_ARRIVALS = "poisson|constant|bursty|diurnal|FILE"
_ARRIVALS_HELP = "Arrival process, or trace with lines of seconds[,rows[,tenant]]."
_CAPACITY_HELP = "Search for the highest rate that holds --slo-ms."
_CONNECTIONS_HELP = "Closed loop: clients (16); open loop: limit (512)."
_SHAPE_HELP = "Sizes of variable axes; SIZE may be LOW:HIGH."
_TENANT_HELP = "name, share, rows, priority, deadline_ms, token_file, api_key_file."
_Texts = list[str] | None


def bench(
    context: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="http://HOST:PORT[/v2/models/NAME]")],
    model: Annotated[str | None, option("NAME", "Model to load (default: the only one).")] = None,
    model_version: Annotated[str | None, option("VERSION", "Version of the model.")] = None,
    rate: Annotated[str | None, option("PER_S,...", "Open loop: requests per second, in turn.")] = None,
    arrivals: Annotated[str, option(_ARRIVALS, _ARRIVALS_HELP)] = "poisson",
    connections: Annotated[int | None, option("N", _CONNECTIONS_HELP, min=1)] = None,
    find_capacity: Annotated[bool, switch("--find-capacity", _CAPACITY_HELP)] = False,
    slo_ms: Annotated[float | None, option("MS", "Limit of p99.")] = None,
    trials: Annotated[int, option("N", "Trials that confirm a capacity.", min=1)] = 5,
    seconds: Annotated[
        float | None, option("S", "Measured time for each rate (10; a trace: all of it).")
    ] = None,
    warmup_s: Annotated[float | None, option("S", "Warm-up before measuring (1; a trace: 0).", min=0)] = None,
    processes: Annotated[int, option("N", "Generator processes.", min=1)] = 1,
    binary: Annotated[bool, switch("--binary", "Binary tensors in both directions.")] = False,
    rows: Annotated[int, option("N", "Rows of each request.", min=1)] = 1,
    shape: Annotated[_Texts, option("INPUT=SIZE,...", _SHAPE_HELP)] = None,
    values: Annotated[_Texts, option("INPUT=LOW:HIGH", "Range of random values (integers: 0:99).")] = None,
    examples: Annotated[int, option("N", "Random inputs, sent in rotation.", min=1)] = 16,
    input_: Annotated[
        _Texts, option("INPUT=FILE.npy|.jsonl", "Inputs from files instead.", "--input")
    ] = None,
    expect: Annotated[_Texts, option("OUTPUT=FILE.npy|.jsonl|URL", "Expected answers.")] = None,
    rtol: Annotated[float, option("R", "Relative tolerance.", min=0)] = 1e-3,
    atol: Annotated[float, option("A", "Absolute tolerance.", min=0)] = 1e-5,
    token: Annotated[str | None, option("TOKEN", "Bearer token.", envvar="COBATCH_BENCH_TOKEN")] = None,
    token_file: Annotated[Path | None, option("FILE", "The same, from a file.")] = None,
    api_key: Annotated[str | None, option("KEY", "For X-API-Key.", envvar="COBATCH_BENCH_API_KEY")] = None,
    header: Annotated[_Texts, option("'NAME: VALUE'", "Additional header.")] = None,
    tenant: Annotated[_Texts, option("KEY=VALUE,...", _TENANT_HELP)] = None,
    priority: Annotated[int, option("N", "Of each request; 1 is the highest.", min=0)] = 0,
    deadline_ms: Annotated[float | None, option("MS", "Deadline of each request (V2's timeout).")] = None,
    timeout_s: Annotated[float, option("S", "Longest wait for an answer.")] = 30.0,
    ca_file: Annotated[Path | None, option("FILE", "CA certificates to verify the server with.")] = None,
    insecure: Annotated[bool, switch("--insecure", "Do not verify the server's certificate.")] = False,
    seed: Annotated[int, option("N", "Equal seeds send equal loads.", min=0)] = 1,
    json_file: Annotated[Path | None, option("FILE", "Write all results as JSON.", "--json")] = None,
    html_file: Annotated[Path | None, option("FILE", "Write a page with charts.", "--html")] = None,
    quiet: Annotated[bool, switch("--quiet", "Show the report only, no progress.")] = False,
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
