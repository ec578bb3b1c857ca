"""`cobatch simulate` and `cobatch profile`: the scheduler under simulated load, and its input, run times."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from cobatch.batcher.simulator.bound import capacity
from cobatch.batcher.simulator.engine import Profile, ProfileError, included, load_profile
from cobatch.batcher.simulator.measure import measure, noise_of
from cobatch.batcher.simulator.nodes import ROUTERS
from cobatch.batcher.simulator.scenario import Closed, Scenario, Totals, results_of, run
from cobatch.batcher.simulator.traffic import (
    PROCESSES,
    Arrivals,
    Caller,
    Poisson,
    Trace,
    TraceError,
    trace_of,
)
from cobatch.engines.errors import EngineError
from cobatch.engines.loader import EngineOptions, load_engine
from cobatch.server.cli.plots import PlotError, Runs, check_plot, plot_runs
from cobatch.server.console import end, option, plain_table, stdout, switch
from cobatch.server.settings.schema import ENGINES

_WARMUP_PART = 0.1
_TENANT = "A tenant: name, share, weight, priority, rows, deadline_ms, ..."
_PROCESSES = "poisson|constant|bursty|diurnal|FILE"
_TRACE = "An arrival process, or a recorded trace with lines of seconds[,rows[,tenant]]."
_OptionalRows = Annotated[int | None, option("ROWS", "As for serve.", min=1)]
_OptionalMs = Annotated[float | None, option("MS", "As for serve.", min=0.0)]


def simulate(
    profile: Annotated[
        str | None, typer.Argument(metavar="PROFILE", help="Included profile, or file.")
    ] = None,
    listing: Annotated[bool, switch("--list", "List the included profiles.")] = False,
    rate: Annotated[float | None, option("PER_S", "Requests per second.")] = None,
    load: Annotated[str, option("PARTS", "In place of --rate: parts of the capacity (0.8).")] = "",
    arrivals: Annotated[str, option(_PROCESSES, _TRACE)] = "poisson",
    connections: Annotated[int | None, option("N", "Closed loop in place of --rate: callers.", min=1)] = None,
    deadline_ms: Annotated[float | None, option("MS", "Deadline of each request.")] = None,
    tenant: Annotated[list[str] | None, option("KEY=VALUE,...", _TENANT)] = None,
    nodes: Annotated[int, option("N", "Servers behind a router.", min=1)] = 1,
    router: Annotated[str, option("|".join(ROUTERS), "How requests are routed.")] = "two-choices",
    seconds: Annotated[float | None, option("S", "Measured virtual time; warm-up: a tenth.")] = None,
    requests: Annotated[int, option("N", "In place of --seconds: about N requests.", min=1)] = 100_000,
    max_batch_size: _OptionalRows = None,
    max_queue_rows: _OptionalRows = None,
    max_delay_ms: _OptionalMs = None,
    latency_target_ms: _OptionalMs = None,
    handover_ms: Annotated[float, option("MS", "Delay from event loop to engine, and back.", min=0.0)] = 0.0,
    request_us: Annotated[float, option("US", "Loop's time for each request; one node.", min=0.0)] = 0.0,
    seed: Annotated[int, option("N", "Same seed, same figures.")] = 1,
    json_file: Annotated[Path | None, option("FILE", "Write all figures.", "--json")] = None,
    plot: Annotated[Path | None, option("FILE.svg", "Plot goodput by load, or batch sizes.")] = None,
) -> None:
    """Simulate a server under load in virtual time, with the scheduler that serves.

    A million requests take seconds. The bound is a limit that no policy could exceed (docs/scheduling.md).
    To compare the policies of other servers: python -m benchmarks.scheduling, in a checkout of cobatch.
    """
    if listing or profile is None:
        for name in included():
            known = load_profile(name)
            typer.echo(f"{name}: {known.name}. Source: {known.source}.")
        raise typer.Exit(0 if listing else 2)
    if request_us and nodes > 1:
        raise end("--request-us is the time of one node's event loop: --nodes must be 1", 2)
    # A trace has its own rate, and a closed loop no arrivals.
    timed = arrivals not in PROCESSES or (connections and arrivals != "poisson")
    given = {"--rate": rate, "--load": load, "--connections": connections, "--arrivals": timed}
    if len(flags := [flag for flag, value in given.items() if value]) > 1:
        raise end(f"{' and '.join(flags)} exclude each other", 2)
    if router not in ROUTERS:
        raise end(f"--router: expected one of {', '.join(ROUTERS)}, got {router!r}", 2)
    try:
        if plot is not None:
            check_plot(plot)
        base = Scenario(
            load_profile(profile),
            Poisson(1.0) if connections is None else Closed(connections),
            parse_callers(tenant or [], deadline_ms),
            nodes=nodes,
            router=router,
            max_batch_size=max_batch_size,
            max_queue_rows=max_queue_rows,
            max_delay_ms=max_delay_ms or 0.0,
            latency_target_ms=latency_target_ms,
            handover_ms=handover_ms,
            request_us=request_us,
            seed=seed,
        )
        loads = parse_numbers("--load", load or "0.8")
        scenarios = make_scenarios(
            base, rate=rate, loads=loads, arrivals=arrivals, seconds=seconds, requests=requests
        )
        runs = [(each, results_of(run(scenario))) for each, scenario in scenarios]
    except (OptionError, PlotError, ProfileError, TraceError) as error:
        raise end(str(error), 2) from None
    show(base.profile, runs)
    try:
        if json_file is not None:
            json_file.write_text(as_json(base.profile, runs))
        if plot is not None:
            plot_runs(plot, base.profile.name, runs)
    except OSError as error:
        raise end(f"{error.filename}: {error.strerror}", 1) from None


def profile(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file.")],
    output: Annotated[Path | None, option("FILE", "Output file (default: stdout).", "--output", "-o")] = None,
    engine: Annotated[str, option("|".join((*ENGINES, "NAME")), "The engine that runs it.")] = "auto",
    max_batch_size: Annotated[int, option("ROWS", "Rows of a batch at most.", min=1)] = 64,
    threads: Annotated[int | None, option("N", "The engine's threads.", min=1)] = None,
    seconds: Annotated[float, option("S", "Duration of the measurement.", min=0.0)] = 10.0,
) -> None:
    """Measure the run times of a model by batch size, for `cobatch simulate`.

    Runs zeros at powers of two and halfway between them, writes quantiles of each size as JSON,
    and says on stderr if the times are noisy.
    """
    try:
        with closing(load_engine(engine, str(model), max_batch_size, EngineOptions(threads))) as opened:
            opened.open()
            measured = measure(opened, model.stem, seconds)
    except EngineError as error:
        raise end(str(error), 1) from None
    noise = noise_of(measured)
    if noise is not None:
        typer.echo(f"cobatch: {noise}", err=True)
    text = json.dumps(measured.as_json(), indent=2)
    if output is None:
        typer.echo(text)
        return
    try:
        output.write_text(text + "\n")
    except OSError as error:
        raise end(f"{output}: {error.strerror}", 1) from None


class OptionError(Exception):
    """The value of an option is refused; the text is one line."""


def make_scenarios(
    base: Scenario,
    *,
    rate: float | None,
    loads: Sequence[float],
    arrivals: str,
    seconds: float | None,
    requests: int,
) -> Iterator[tuple[float | None, Scenario]]:
    """Yield a scenario for each load, or one for the closed loop in `base`, a trace or a rate."""
    for load, process in _arrivals(base, rate, loads, arrivals):
        length_s = seconds or _length_s(base, process, requests)
        yield load, replace(base, arrivals=process, seconds=length_s, warmup_s=_WARMUP_PART * length_s)


def _arrivals(
    base: Scenario, rate: float | None, loads: Sequence[float], arrivals: str
) -> list[tuple[float | None, Arrivals | Closed]]:
    if isinstance(base.arrivals, Closed):
        return [(None, base.arrivals)]
    trace = trace_of(arrivals)
    if trace is not None:
        return [(None, trace)]
    most = _request_capacity(base)
    rates = [rate] if rate is not None else [load * most for load in loads]
    if min(rates) <= 0:
        raise OptionError("--rate, --load: must be more than 0")
    return [(rate / most, PROCESSES[arrivals](rate)) for rate in rates]


def _request_capacity(base: Scenario) -> float:
    """Return the most requests per second of all nodes."""
    deadlines = [caller.timeout_s for caller in base.callers if caller.timeout_s is not None]
    deadline_s = min(deadlines) if len(deadlines) == len(base.callers) else None
    per_node, _ = capacity(base.profile, base.batch_rows, deadline_s)
    if not per_node:
        raise OptionError("no run is as short as the deadline")
    shares = sum(caller.share for caller in base.callers)
    mean_rows = sum(caller.share * caller.rows for caller in base.callers) / shares
    return base.nodes * per_node / mean_rows


def _length_s(base: Scenario, process: Arrivals | Closed, requests: int) -> float:
    if isinstance(process, Trace):
        return max(process.requests[-1].time_s, 1e-3) / (1 + _WARMUP_PART)
    rate = _request_capacity(base) if isinstance(process, Closed) else process.rate
    return requests / rate / (1 + _WARMUP_PART)


def parse_numbers(flag: str, text: str) -> list[float]:
    """Parse numbers separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"{flag}: expected numbers separated by commas, got {text!r}") from None


def parse_callers(texts: Sequence[str], deadline_ms: float | None) -> tuple[Caller, ...]:
    """Parse `name=a,share=2` for each tenant; `deadline_ms` is the default of each."""
    kinds = get_type_hints(Caller)
    parsed = [{"deadline_ms": deadline_ms} | parse_settings("--tenant", text, kinds) for text in texts]
    return tuple(Caller(**values) for values in parsed or [{"deadline_ms": deadline_ms}])


def parse_settings(flag: str, text: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Parse `key=value,key=value`, with the type of each key; a tuple is written as 32/64."""
    values: dict[str, Any] = {}
    for part in text.split(",") if text else ():
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise OptionError(f"{flag}: expected key=value, got {part!r}")
        if key not in kinds:
            raise OptionError(f"{flag}: no setting {key!r}; expected one of {', '.join(kinds)}")
        given = value.split("/") if get_origin(kinds[key]) is tuple else value
        try:
            values[key] = msgspec.convert(given, kinds[key], strict=False)
        except msgspec.ValidationError:
            raise OptionError(f"{flag}: {value!r} is not a valid {key}") from None
    return values


def show(profile: Profile, runs: Runs) -> None:
    """Print the tables to stdout."""
    console = stdout()
    console.print(Text(profile.name, "bold"), soft_wrap=True)
    console.print(_loads_table(runs))
    if any(len(results.tenants) > 1 for _, results in runs):
        console.print(_tenants_table(runs))
    took_s = sum(results.took_s for _, results in runs)
    arrived = sum(results.arrived for _, results in runs)
    console.print(f"simulated {arrived:,} requests in {took_s:.1f} s")


def _loads_table(runs: Runs) -> Table:
    table = plain_table(
        "load", "offered/s", "goodput/s", "p50 ms", "p99 ms", "expired", "refused", "late", "bound/s",
        "of bound", "batch rows", "busy", "dispatch reasons",
    )  # fmt: skip
    for load, results in runs:
        total = results.total
        batches = sum(results.reasons.values()) or 1
        table.add_row(
            _load(load),
            "-" if results.offered is None else f"{results.offered:,.0f}",
            *_cells(total),
            _part(total.late, total),
            "-" if results.bound is None else f"{results.bound:,.0f}",
            f"{total.goodput / results.bound:.1%}" if results.bound else "-",
            f"{results.mean_batch:.1f}",
            f"{results.utilisation:.0%}",
            " ".join(f"{reason} {count / batches:.0%}" for reason, count in results.reasons.items()),
        )
    return table


def _tenants_table(runs: Runs) -> Table:
    table = plain_table("tenant", "load", "goodput/s", "p50 ms", "p99 ms", "expired", "refused", "rows")
    for load, results in runs:
        for tenant, totals in results.tenants.items():
            table.add_row(tenant, _load(load), *_cells(totals), f"{totals.rows_share:.1%}")
    return table


def _cells(totals: Totals) -> list[str]:
    latency = [f"{totals.latency_ms[name]:.1f}" for name in ("p50", "p99")]
    return [f"{totals.goodput:,.0f}", *latency, _part(totals.expired, totals), _part(totals.refused, totals)]


def _load(load: float | None) -> str:
    return "-" if load is None else f"{load:.2f}"


def _part(count: int, totals: Totals) -> str:
    return f"{count / max(1, totals.ended):.1%}"


def as_json(profile: Profile, runs: Runs) -> str:
    """Return all figures of all runs."""
    documents = [{"load": load, **asdict(results)} for load, results in runs]
    document = {"profile": profile.as_json(), "runs": documents}
    return json.dumps(document, indent=2) + "\n"
