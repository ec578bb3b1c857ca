"""Call the overrides of our callbacks through NVIDIA's base classes, as C++ does; print what they return.

As JSON. Run by the conformance test, in a new process, with the name of a module of bindings.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from cobatch.engines.tensorrt.diagnostics import make_log, make_recorder
from cobatch.engines.tensorrt.plans.build import make_watch


def recorded(trt: Any) -> list[Any]:
    """Report two errors to a recorder and read it."""
    base, recorder = trt.IErrorRecorder, make_recorder(trt)
    told = [base.report_error(recorder, trt.ErrorCodeTRT.INVALID_STATE, text) for text in ("one", "two")]
    read = [base.num_errors(recorder), base.get_error_desc(recorder, 1), base.has_overflowed(recorder)]
    code = base.get_error_code(recorder, 0).name
    base.clear(recorder)
    return [told, *read, code, base.num_errors(recorder)]


def logged(trt: Any) -> list[str]:
    """Log an error."""
    log = make_log(trt)
    trt.ILogger.log(log.logger, trt.ILogger.Severity.ERROR, "logged")
    return log.take()


def watched(trt: Any) -> list[Any]:
    """Go through a phase of two steps, and cancel at its second."""
    seen: list[tuple[str, float]] = []

    def progress(phase: str, fraction: float) -> bool:
        seen.append((phase, fraction))
        return fraction < 1

    base, monitor = trt.IProgressMonitor, make_watch(trt, progress).monitor
    base.phase_start(monitor, "all", "", 2)
    going = [base.step_complete(monitor, "all", step) for step in range(2)]
    base.phase_finish(monitor, "all")
    return [seen, going]


def main() -> None:
    """Print a result for each base class that the bindings have."""
    trt = importlib.import_module(sys.argv[1])
    calls = {"IErrorRecorder": recorded, "ILogger": logged, "IProgressMonitor": watched}
    results = {name: call(trt) for name, call in calls.items() if hasattr(trt, name)}
    print(json.dumps(results))  # noqa: T201 - a program


if __name__ == "__main__":
    main()
