"""How far a build is, from TensorRT's progress monitor: a tree of phases folded into one fraction."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Called with the innermost phase's name and the whole's fraction; False cancels the build.
Progress = Callable[[str, float], bool]


@dataclass(slots=True)
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """The phases that are open. Thread-safe, since TensorRT reports from several threads.

    A phase fills the step of its parent that runs. The fraction never falls, although TensorRT enters
    some phases several times.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, _Phase] = {}
        self._fraction = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> float:
        """A phase begins; `parent` is None for an outermost one."""
        with self._lock:
            self._open[name] = _Phase(parent, max(1, steps))
            return self._advance(name)

    def step(self, name: str, step: int) -> float:
        """Step `step`, from 0 on, of a phase is done."""
        with self._lock:
            phase = self._open.get(name)
            if phase is not None:
                phase.done = min(step + 1, phase.steps)
            return self._advance(name)

    def finish(self, name: str) -> float:
        """A phase ends, perhaps before its last step."""
        with self._lock:
            phase = self._open.get(name)
            if phase is not None:
                phase.done = phase.steps
            fraction = self._advance(name)
            self._open.pop(name, None)
            return fraction

    def _advance(self, name: str | None) -> float:
        fraction = 0.0
        while name is not None and (phase := self._open.get(name)) is not None:
            # A child that is complete does not complete its parent's step: that is told apart.
            fraction = min(1.0, (phase.done + fraction) / phase.steps)
            name = phase.parent if phase.parent != name else None
        self._fraction = max(self._fraction, fraction)
        return self._fraction


class BuildWatch:
    """`monitor` is handed to TensorRT. `cancelled` tells whether the build was asked to stop."""

    def __init__(self) -> None:
        self.monitor: Any = None
        self.cancelled = False
        self.error: BaseException | None = None


def make_watch(trt_module: Any, progress: Progress) -> BuildWatch:
    """A monitor of this module that tells `progress`; what that raises ends the build and is kept."""
    watch = BuildWatch()
    phases = Phases()

    def tell(name: str, fraction: float) -> bool:
        # There is C++ above: an exception that left would end the process.
        if watch.cancelled:
            return False
        try:
            watch.cancelled = not progress(name, fraction)
        except BaseException as error:  # noqa: BLE001 - raised again by the one who waits for the build
            watch.error = error
            watch.cancelled = True
        return not watch.cancelled

    class Monitor(trt_module.IProgressMonitor):  # type: ignore[misc]  # its base is known at run time only
        def __init__(self) -> None:
            trt_module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            tell(phase_name, phases.start(phase_name, parent_phase or None, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            return tell(phase_name, phases.step(phase_name, step))

        def phase_finish(self, phase_name: str) -> None:
            tell(phase_name, phases.finish(phase_name))

    watch.monitor = Monitor()
    return watch
