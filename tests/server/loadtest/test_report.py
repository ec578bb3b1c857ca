"""The live view of `cobatch bench`."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from cobatch.batcher.simulator.traffic import Constant
from cobatch.server.loadtest.messages import Heartbeat, NewKind, Samples, Trial
from cobatch.server.loadtest.report import Progress
from cobatch.server.loadtest.statistics import Tally


def tally(seconds: float = 5.0) -> Tally:
    """Return 2.5 s at 10 requests/s, one in ten refused, with a slower last second."""
    found = Tally(Trial(Constant(10.0), 4, seconds), [None])
    found.take(0, NewKind(1, "429 queue-full", "no room"))
    rows = [
        (n / 10, n / 10, n / 10, n / 10 + (0.02 if n >= 10 else 0.01), n % 10 == 9, 0, 3) for n in range(25)
    ]
    found.take(0, Samples(np.array(rows, np.float64).tobytes()))
    found.take(0, Heartbeat(7, 0.25))
    found.__class__ = type("At", (Tally,), {"elapsed_s": 2.5})
    return found


def shown(terminal: bool, quiet: bool = False, seconds: float = 5.0) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=200, color_system=None, highlight=False)
    with Progress(quiet, console) as progress:
        progress.update("10/s", tally(seconds))
        progress.say("a word")
    return text.getvalue()


def test_a_terminal_shows_the_last_second_and_the_whole_trial() -> None:
    lines = shown(terminal=True).splitlines()
    assert any(line.startswith("10/s: 2.5 of 5.0 s") for line in lines)
    recent = next(line for line in lines if line.startswith("last second")).split()
    every = next(line for line in lines if line.startswith("all ")).split()
    assert recent[2:6] == ["10", "9", "20.00", "20.00"]
    assert recent[-1] == "3.0"
    assert every[1:3] == ["10", "9"]
    assert any("7 in flight, generator CPU 25%" in line for line in lines)
    assert any("2 x 429 queue-full" in line for line in lines)
    assert any("a word" in line for line in lines)


def test_a_pipe_gets_a_line_every_few_seconds() -> None:
    assert shown(terminal=False).splitlines() == [
        "10/s   2.5 s: 10/s offered, 9/s answered, p50 20.00 ms, p99 20.00 ms, 1 failed",
        "a word",
    ]


def test_a_long_trial_shows_the_last_second_too() -> None:
    """The intervals of its charts are six seconds long."""
    assert "p50 20.00 ms" in shown(terminal=False, seconds=600.0)
    assert shown(terminal=False, seconds=600.0) == shown(terminal=False)


def test_quiet_shows_nothing() -> None:
    assert not shown(terminal=False, quiet=True)
    assert not shown(terminal=True, quiet=True)
