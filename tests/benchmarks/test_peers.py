"""The comparison of servers without the servers: bodies, ratios, tables, plots."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks.common import wire
from benchmarks.peers import page
from benchmarks.peers.catalogue import OURS, PEERS, Body
from benchmarks.peers.goals import Goal, goals
from benchmarks.peers.overload import Overload, arrivals, body_of
from benchmarks.peers.plots import draw_bars
from benchmarks.peers.results import Results, ratio, read
from benchmarks.peers.tables import Table, tables
from benchmarks.peers.turns import Turn

TURN = Turn("tiny", "cobatch", "V2 JSON", "JSON", 64, 0, 30_000.0, 1500.0, 3000.0, 20.0, 32.0, 10**8, 0)


def _turns() -> list[Turn]:
    ours = [replace(TURN, round=number, cpu_us=cpu) for number, cpu in enumerate((10.0, 20.0, 40.0))]
    theirs = [
        replace(TURN, peer="mosec", body="JSON", round=number, cpu_us=cpu)
        for number, cpu in enumerate((30.0, 40.0, 80.0))
    ]
    return [*theirs, *ours]


@pytest.mark.parametrize("body", list(Body))
def test_a_request_contains_the_row_and_an_answer_is_decoded(body: Body) -> None:
    row = wire.rows_of("tiny", 1, 3)
    message = body.make_request("tiny", row)
    if body is Body.RAW:
        sent = np.frombuffer(message.body, "<f4")
        answer = message.body
    elif body in {Body.V2_JSON, Body.V2_BINARY}:
        length = int(message.headers.get(wire.JSON_LENGTH, len(message.body)))
        tensor = json.loads(message.body[:length])["inputs"][0]
        sent = np.array(tensor.get("data", np.frombuffer(message.body[length:], "<f4")), "<f4")
        # An answer has the form of a request with another key.
        answer = json.dumps({"outputs": [tensor]}).encode() + message.body[length:]
        headers = {} if body is Body.V2_JSON else {wire.JSON_LENGTH: str(len(answer) - 64)}
        assert np.array_equal(body.read_output(wire.Message(answer, headers)), row[0])
        return
    else:
        said = json.loads(message.body)["x"]
        sent = np.array(said, "<f4").reshape(-1)
        answer = json.dumps(said if body is Body.BATCHED else {"y": said}).encode()
    assert np.array_equal(sent, row[0])
    assert np.array_equal(body.read_output(wire.Message(answer, {})), row[0])


@pytest.mark.parametrize("body", [Body.V2_JSON, Body.V2_BINARY])
def test_a_deadline_is_added_and_the_rest_is_unchanged(body: Body) -> None:
    plain = body.make_request("tiny", wire.rows_of("tiny", 1, 3))
    timed = wire.with_deadline(plain, 100)

    def split(message: wire.Message) -> tuple[dict[str, object], bytes]:
        length = int(message.headers.get(wire.JSON_LENGTH, len(message.body)))
        return json.loads(message.body[:length]), message.body[length:]

    (before, before_tail), (after, after_tail) = split(plain), split(timed)
    assert after_tail == before_tail
    parameters = after.pop("parameters")
    assert isinstance(parameters, dict)
    assert parameters.pop("timeout") == 100_000
    assert {**after, **({"parameters": parameters} if parameters else {})} == before


def test_a_raw_request_has_its_head_and_body() -> None:
    message = Body.RAW.make_request("tiny", wire.rows_of("tiny", 1, 3))
    head, _, body = wire.raw_request(message, "127.0.0.1:1", "/raw").partition(b"\r\n\r\n")
    assert head.splitlines()[0] == b"POST /raw HTTP/1.1"
    assert b"Content-Length: 64" in head.splitlines()
    assert body == message.body


def test_ratios_are_formed_within_a_round() -> None:
    found = ratio(_turns(), "mosec", lambda turn: turn.cpu_us, model="tiny")
    assert found == (2.0, 2.0, 3.0)  # the ratio of the medians would be 2.0 and hide the 3
    assert ratio(_turns(), "ray", lambda turn: turn.cpu_us) is None


def test_results_are_written_and_read(tmp_path: Path) -> None:
    machine = {"cpu": "C", "cores": 2, "system": "S", "wrk": "w"}
    settings = {"max_batch": 64, "max_wait_ms": 2, "plans": ["tiny"], "checked": 32, "date": "today"}
    results = Results(machine, settings, versions={"cobatch": {"cobatch": "1"}}, turns=_turns())
    results.skipped["ray"] = "there is no Ray"
    results.overload.append(Overload("wide", "mosec", "raw", 0, 100.0, 150.0, 90.0, 40.0, 60.0, 90.0, 101.0))
    page.write(results, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Ray Serve: there is no Ray" in text
    assert "2.00 (2.00-3.00)" in text  # CPU of mosec relative to ours
    assert "mosec, JSON, 64 conn." in text
    assert "| 40%" in text.replace("|                ", "| ")  # its goodput in overload
    again = read(json.loads((tmp_path / "peers.json").read_text()))
    assert again.turns == results.turns
    assert again.overload == results.overload
    for plot in ("cpu", "rate", "overload"):
        ET.fromstring((tmp_path / f"{plot}.svg").read_text())


def test_the_columns_of_a_table_are_aligned() -> None:
    lines = (
        Table("t", ["a", "b", "c"], [["long name", "x", "1"], ["n", "y", "1,000"]]).markdown().splitlines()
    )
    assert len({len(line) for line in lines}) == 1
    assert lines[3].endswith("| 1,000 |")
    assert [table.title for table in tables(Results({}, {}, turns=[TURN]))] == ["tiny, JSON"]


def _goal(results: Results, text: str) -> Goal:
    (found,) = [goal for goal in goals(results) if goal.text.startswith(text)]
    return found


@pytest.mark.parametrize(("theirs", "met"), [(130.1, True), (129.9, False)])
def test_a_goal_is_met_if_the_worst_case_is_good_enough(theirs: float, met: bool) -> None:
    ours = [replace(TURN, connections=many, cpu_us=100.0) for many in (1, 64)]
    mosec = [replace(TURN, peer="mosec", connections=1, cpu_us=900.0)]
    mosec += [replace(TURN, peer="mosec", connections=64, cpu_us=theirs)]
    goal = _goal(Results({}, {}, turns=[*ours, *mosec]), "CPU beside mosec")
    assert goal.met is met
    assert goal.found == pytest.approx(theirs / 100)
    assert goal.where == "mosec, JSON, 64 conn."


def test_more_requests_are_better_and_one_connection_does_not_count() -> None:
    turns = [TURN, replace(TURN, peer="mosec", per_s=10_000.0)]
    turns += [replace(turn, connections=1, per_s=1.0) for turn in turns[:1]]
    turns += [replace(turn, connections=1, per_s=9.0) for turn in turns[1:2]]
    goal = _goal(Results({}, {}, turns=turns), "requests/s, tiny")
    assert goal.found == pytest.approx(3.0)


def test_a_goal_with_unmeasured_servers_cannot_be_met_but_missed() -> None:
    def found(cpu_us: float) -> Goal:
        turns = [TURN, replace(TURN, peer="ray", cpu_us=cpu_us)]
        return _goal(Results({}, {}, turns=turns), "CPU per request, tiny")

    assert found(2000.0).met is None
    assert found(2000.0).missing == ("triton", "mlserver", "litserve", "bentoml")
    assert found(99.0).met is False
    assert _goal(Results({}, {}, turns=[TURN]), "requests/s, wide").met is None


@pytest.mark.parametrize(("goodput", "met"), [(90.1, True), (89.9, False)])
def test_goodput_is_that_of_cobatch(goodput: float, met: bool) -> None:
    one = Overload("wide", "cobatch", "raw", 0, 100.0, 150.0, goodput, goodput, 60.0, 90.0, 99.0)
    results = Results({}, {}, turns=[TURN], overload=[one, replace(one, peer="mosec", goodput=1.0)])
    assert _goal(results, "goodput").met is met


def test_a_bar_is_longer_by_the_same_length_for_each_factor() -> None:
    axes = Figure().subplots()
    draw_bars(axes, {"a": {"JSON": 10.0}, "b": {"JSON": 100.0}, "c": {"JSON": 1000.0, "binary": 5.0}})
    assert axes.get_xscale() == "log"
    lengths = [bar.get_window_extent().width for bar in axes.patches[:3]]
    assert lengths[2] - lengths[1] == pytest.approx(lengths[1] - lengths[0], abs=0.2)
    assert lengths[1] > lengths[0]
    assert [text.get_text() for text in axes.texts] == ["10", "100", "1,000", "5"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


def test_every_server_has_an_app_and_binary_bodies_come_first() -> None:
    apps = Path(page.__file__).parent / "apps"
    assert [peer.name for peer in PEERS if peer is not OURS and not (apps / peer.app).exists()] == []
    assert body_of(OURS) is Body.V2_BINARY
    assert {body_of(peer).kind for peer in PEERS if len(peer.paths) == 1} == {"JSON"}


def test_arrivals_have_their_rate() -> None:
    times_s = arrivals(1000.0, 4.0, seed=1)
    assert times_s == sorted(times_s)
    assert 3700 < len(times_s) < 4300
    assert times_s[-1] < 4.0
