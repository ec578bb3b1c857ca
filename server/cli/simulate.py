"""`cobatch simulate` and `cobatch profile`: the scheduler under a load that is only thought, and what that
needs to know of a model.

Registered by server/cli/__init__.py. What they run is imported when they run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cobatch.server.console import end

if TYPE_CHECKING:
    from cobatch.batcher.simulator.scenario import Results, Scenario

_ARRIVALS = "poisson|bursty|diurnal|even|FILE"


def simulate(
    profile: Annotated[
        str | None,
        typer.Argument(metavar="PROFILE", help="A file of `cobatch profile`, or an included profile."),
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="List the included profiles, and end.")] = False,
    rate: Annotated[float | None, typer.Option(metavar="PER_S", help="Requests per second.")] = None,
    load: Annotated[
        str, typer.Option(metavar="PARTS", help="Instead: parts of the capacity, one run for each.")
    ] = "0.8",
    arrivals: Annotated[
        str, typer.Option(metavar=_ARRIVALS, help="A process, or a recorded trace: seconds[,rows[,tenant]].")
    ] = "poisson",
    connections: Annotated[
        int | None, typer.Option(metavar="N", help="Instead: callers who each wait for their answer.")
    ] = None,
    deadline_ms: Annotated[float | None, typer.Option(metavar="MS", help="Of each request.")] = None,
    tenant: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,...", help="name, share, weight, priority, rows, deadline_ms."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:KEY=VALUE,...]", help="cobatch, or one of others; several are compared."),
    ] = None,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Servers behind a router.")] = 1,
    router: Annotated[
        str, typer.Option(metavar="round-robin|least-loaded|two-choices", help="Who gets a request.")
    ] = "two-choices",
    seconds: Annotated[float | None, typer.Option(metavar="S", help="Measured, of virtual time.")] = None,
    requests: Annotated[int, typer.Option(metavar="N", help="Instead: about so many requests.")] = 100_000,
    max_batch_size: Annotated[int | None, typer.Option(metavar="ROWS", min=1)] = None,
    max_queue_rows: Annotated[int | None, typer.Option(metavar="ROWS", min=1)] = None,
    handover_ms: Annotated[float, typer.Option(metavar="MS", help="Loop to engine, and back.")] = 0.0,
    request_us: Annotated[
        float, typer.Option(metavar="US", min=0.0, help="Of the event loop, for each request; one node only.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Same seed, same figures.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="All figures.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Goodput, or batch sizes.")] = None,
) -> None:
    """Simulate a server under load in virtual time, with the scheduler that serves.

    A million requests take seconds. Policies of others (fixed-window, size-or-timeout, triton, clipper) can
    be compared with it, each with its settings: --policy triton:preferred=32/64,delay_ms=5. The bound is
    what no policy could exceed; docs/scheduling.md has the argument.
    """
    from cobatch.batcher.simulator.engine import ProfileError, included, load_profile

    if listing or profile is None:
        for name in included():
            found = load_profile(name)
            typer.echo(f"{name}: {found.name}. Source: {found.source}.")
        raise typer.Exit(0 if listing else 2)
    from cobatch.batcher.simulator.traffic import TraceError
    from cobatch.server.cli import simulate_show, simulate_spec

    if request_us and nodes > 1:
        raise end("--request-us is of one node's event loop: --nodes must be 1", 2)
    try:
        asked = simulate_spec.Asked(
            profile=load_profile(profile),
            rate=rate,
            loads=simulate_spec.numbers("--load", load),
            arrivals=arrivals,
            connections=connections,
            callers=simulate_spec.callers(tenant or [], deadline_ms),
            policies=simulate_spec.policies(policy or ["cobatch"]),
            seconds=seconds,
            requests=requests,
            more={
                "nodes": nodes,
                "router": simulate_spec.router(router),
                "max_batch_size": max_batch_size,
                "max_queue_rows": max_queue_rows,
                "handover_ms": handover_ms,
                "request_us": request_us,
                "seed": seed,
            },
        )
        results = _run_all(simulate_spec.scenarios(asked))
    except (simulate_spec.SpecError, ProfileError, TraceError) as error:
        raise end(str(error), 2) from None
    simulate_show.show(asked.profile, results)
    try:
        if json_file is not None:
            json_file.write_text(simulate_show.as_json(asked.profile, results))
        if plot is not None:
            plot.write_text(simulate_show.plot(asked.profile, results))
    except OSError as error:
        raise end(f"{error.filename}: {error.strerror}", 1) from None


def _run_all(scenarios: list[tuple[str, float | None, Scenario]]) -> list[tuple[str, float | None, Results]]:
    from cobatch.batcher.simulator.scenario import results_of, run

    return [(name, load, results_of(run(scenario))) for name, load, scenario in scenarios]


def profile(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to (default: stdout).")
    ] = None,
    engine: Annotated[str, typer.Option(metavar="auto|onnxruntime|tensorrt", help="What opens it.")] = "auto",
    max_batch_size: Annotated[int, typer.Option(metavar="ROWS", min=1, help="Most rows in a batch.")] = 64,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="The engine's threads.")] = None,
    seconds: Annotated[float, typer.Option(metavar="S", min=0.0, help="To measure for.")] = 10.0,
) -> None:
    """Measure how long a model's batches take, for `cobatch simulate`.

    Runs zeros at powers of two and halfway between them, and writes quantiles of each size as JSON.
    """
    import json

    from cobatch.batcher.simulator.measure import measure
    from cobatch.engines.errors import EngineError
    from cobatch.engines.loader import EngineOptions, load_engine

    try:
        opened = load_engine(engine, str(model), max_batch_size, EngineOptions(threads))
        try:
            opened.open()
            document: dict[str, Any] = measure(opened, model.stem, seconds).as_json()
        finally:
            opened.close()
    except EngineError as error:
        raise end(str(error), 1) from None
    text = json.dumps(document, indent=2)
    if output is None:
        typer.echo(text)
        return
    try:
        output.write_text(text + "\n")
    except OSError as error:
        raise end(f"{output}: {error.strerror}", 1) from None
