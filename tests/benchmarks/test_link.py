"""The stress of links, a five-hundredth of it, and the faults that it would notice."""

from __future__ import annotations

import signal
import socket
from contextlib import closing
from math import inf
from pathlib import Path

import pytest

from benchmarks.link import figures, server, workers
from benchmarks.link.ends import Answered, Row
from benchmarks.link.silences import Explained, Look, Watcher
from benchmarks.link.stress import Stress
from benchmarks.link.workers import Front, Leftover, Silence


@pytest.mark.slow
def test_answers_are_right_while_processes_stop_and_die() -> None:
    stress = Stress(2, 0.2)
    try:
        stress.run(2000)
    finally:
        for child in stress.children.values():
            child.end()
    assert stress.counts["answered"] >= 2000
    # A busy machine may explain any silence.
    assert stress.faults(limit_s=inf) == []


@pytest.mark.slow
def test_a_server_answers_right_while_its_processes_stop_and_die(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "LIMIT_S", inf)
    monkeypatch.setattr(server, "RESTART_LIMIT_S", inf)
    monkeypatch.setattr(server, "_YOUNG_S", 0.0)
    assert server.run(500, 2, 0.5) == []


def test_a_wrong_or_another_slots_answer_is_noticed() -> None:
    control, other = socket.socketpair()
    with control, other:
        front = Front(control)
        with closing(front.selector):
            front.rows[:2, 0] = front.rows[:2, -1] = 7
            right = front.rows[0] + 1
            wrong = right.copy()
            wrong[len(wrong) // 2] += 1
            for answer, row, number, count in (
                (right, 0, 7, 0), (right, 1, 7, 1), (right, 0, 8, 2), (wrong, 0, 7, 3),
            ):  # fmt: skip
                front.compare(Answered([Row(number, answer.tobytes())], None), [row])
                assert front.report.wrong == count


def test_a_silence_is_explained_by_stops_of_its_own_processes() -> None:
    stress = Stress(-1, 1.0)  # no processes
    stress.stops = [(-1, 1.0, 2.0), (0, 1.5, 3.0), (1, 3.0, 9.0)]
    stress.silences = [(0, Silence(0.5, 5.0, 0.25))]
    stress.explain()
    assert stress.explained == [Explained(4.5, 2.0, 0.25)]
    assert stress.faults(limit_s=2.25) == []
    assert stress.faults(limit_s=2.2) == ["no answer for 2.25 s without an explanation"]
    stress.leftovers = {-1: Leftover(0, 0), 0: Leftover(1, 0), 1: Leftover(0, 2)}
    stress.counts["wrong"] = 3
    assert stress.faults(limit_s=inf) == [
        "3 answers are wrong",
        "front 0 has 1 blocks, 0 descriptors left",
        "front 1 has 0 blocks, 2 descriptors left",
    ]


def test_a_child_that_dies_with_a_message_unread_is_replaced() -> None:
    stress = Stress(0, 1.0)
    try:
        home = stress.children[-1]
        home.process.send_signal(signal.SIGSTOP)
        home.control.send(b"stop")
        home.process.kill()
        while not stress.counts["died"]:
            stress.look()
        assert stress.children[-1] is not home
    finally:
        stress.children[-1].end()


def test_silences_of_a_server_are_explained() -> None:
    watcher = Watcher(0)
    watcher.stops, watcher.kills = [(1.0, 2.0)], [11.0]
    watcher.looks = [
        Look(0.0, {}),
        Look(1.0, {"home": 0.1, "clients": 0.1}),
        Look(2.5, {"home": 0.1, "clients": 1.5}),  # in the stop, and half a second
        Look(3.5, {"home": 0.125}),
        Look(11.0, {"home": 7.5}),
        Look(11.5, {"supervisor": 0.25, "clients": 0.5}),
        Look(12.5, {"home": 0.5, "supervisor": 1.0, "clients": 1.0}),
    ]
    watcher.silences = [(0.5, 3.0), (10.0, 12.5)]
    killed, explained = zip(*watcher.explain(), strict=True)
    assert killed == (False, True)
    assert explained[0] == pytest.approx(Explained(2.5, 1.0, 0.2 + 0.5 + 0.125))
    assert explained[1] == Explained(1.5, 0.0, 0.75)
    assert server.faults_of([explained[1]], 0.75, "") == []
    assert len(server.faults_of([explained[1]], 0.7, "")) == 1


def test_a_wait_that_lasted_for_several_looks_explains_all_of_them() -> None:
    watcher = Watcher(0)
    watcher.kills = [1.0]
    watcher.looks = [
        Look(1.0, {"supervisor": 0.0}),
        Look(1.25, {"supervisor": 0.0}),  # no home
        Look(1.5, {"supervisor": 0.0, "home": 0.0}),
        Look(1.75, {"supervisor": 0.0, "home": 0.0}),
        Look(2.0, {"supervisor": 0.0, "home": 9.0}),
    ]
    watcher.silences = [(1.0, 2.0)]
    assert list(watcher.explain()) == [(True, Explained(1.0, 0.0, 0.75))]


def test_waits_of_a_silence_are_counted_from_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of a home that has ended within it."""
    own, of_home = Path("front"), Path("home")
    waits_s: dict[int, dict[Path, float]] = {1: {own: 1.0}, 2: {of_home: 1.0}}
    monkeypatch.setattr(workers, "thread_waits_s", lambda process: waits_s[process])
    control, other = socket.socketpair()
    with control, other:
        front = Front(control)
        with closing(front.selector):
            front.processes = (1, 2)
            front.listen()
            front.heard_s = 0.0
            waits_s |= {1: {own: 2.0}, 2: {of_home: 4.0}}
            front.send_report()
            waits_s |= {1: {own: 2.5}, 2: {}}
            front.send_report(at_once=True)
            front.slots[1] = 0
            front.hear()
    assert front.report.silences[0].waited_s == 4.5


def test_the_figures_have_both_ways() -> None:
    with (
        figures.turn_of(64, 2, figures.Messages) as messages,
        figures.turn_of(64, 2, figures.Blocks) as blocks,
    ):
        us = figures.best_us({"messages": messages, "slab": blocks}, 400)
    assert us.keys() == {"messages", "slab"}
