"""Policies by name: cobatch's scheduler, or a baseline with its settings."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

from benchmarks.scheduling.baselines import Baseline, Clipper, FixedWindow, SizeOrTimeout, TritonLike
from cobatch.batcher.simulator.clock import VirtualLoop
from cobatch.batcher.simulator.engine import RunTimeSampler
from cobatch.batcher.simulator.nodes import Node
from cobatch.batcher.simulator.scenario import Run, Scenario, run
from cobatch.server.cli.simulate import OptionError, parse_settings

COBATCH = "cobatch"
_BASELINES: dict[str, type[Baseline]] = {
    "fixed-window": FixedWindow,
    "size-or-timeout": SizeOrTimeout,
    "triton": TritonLike,
    "clipper": Clipper,
}
POLICIES = (COBATCH, *_BASELINES)
_COBATCH_SETTINGS = ("max_batch_size", "max_queue_rows", "max_delay_ms", "latency_target_ms")


@dataclass(frozen=True)
class Policy:
    """A policy with its settings; those of a scenario hold for the others. `label` names it in tables."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    def run(self, scenario: Scenario) -> Run:
        """Run a scenario with this policy."""
        if self.name == COBATCH:
            return run(replace(scenario, **self.settings))
        return run(scenario, self.make_node)

    def make_node(self, scenario: Scenario, loop: VirtualLoop, sampler: RunTimeSampler) -> Node:
        """Make a node of a baseline."""
        kind = _BASELINES[self.name]
        settings = {"max_batch_size": scenario.batch_rows, "handover_s": scenario.handover_ms / 1000}
        if kind is not FixedWindow:
            settings["max_queue_rows"] = scenario.queue_rows
        return kind(loop, sampler, **settings | self.settings)


def parse_policy(text: str) -> Policy:
    """Parse `name` or `name:key=value,key=value`. Raises OptionError."""
    name, _, given = text.partition(":")
    if name not in POLICIES:
        raise OptionError(f"--policy: expected one of {', '.join(POLICIES)}, got {name!r}")
    kinds, required = _settings_of(name)
    settings = parse_settings("--policy", given, kinds)
    missing = [key for key in required if key not in settings]
    if missing:
        raise OptionError(f"--policy: {name} needs {', '.join(missing)}: {name}:{missing[0]}=...")
    return Policy(name, settings, text)


def _settings_of(name: str) -> tuple[dict[str, Any], list[str]]:
    """Return the types of a policy's settings, and the required ones."""
    if name == COBATCH:
        hints = get_type_hints(Scenario)
        return {key: hints[key] for key in _COBATCH_SETTINGS}, []
    kind = _BASELINES[name]
    hints = get_type_hints(kind.__init__)
    own = [one for one in inspect.signature(kind).parameters.values() if one.kind is one.KEYWORD_ONLY]
    shared: dict[str, Any] = {"max_batch_size": int}
    if kind is not FixedWindow:
        shared["max_queue_rows"] = int
    return shared | {one.name: hints[one.name] for one in own}, [
        one.name for one in own if one.default is one.empty
    ]
