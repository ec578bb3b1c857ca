"""The simulation of several processes on many cores, and the costs that it takes."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks.scaling import process_costs
from benchmarks.scaling.process_model import Costs, Result, simulate
from benchmarks.scaling.processes import on_two_cores

COSTS = Costs(
    one_request=8.0,
    one_batch=64.0,
    front_request=10.0,
    front_pair=40.0,
    home_request=0.5,
    home_pair=20.0,
    home_batch=60.0,
    one_apart=6.0,
    front_apart=6.0,
    home_apart=0.75,
    client=5.0,
)


def simulated(cores: int, number: int, *, row_us: float = 0.0) -> Result:
    return simulate(COSTS, cores, number, 64 * max(1, number - 1), row_us, 4000)


def test_the_same_costs_give_the_same_result() -> None:
    assert simulated(8, 7) == simulated(8, 7)


def test_one_process_is_as_fast_as_its_costs_allow() -> None:
    result = simulated(4, 1)
    assert result.limit == "home"
    cpu_us = 8.0 + 6.0 + 64.0 / result.batch_rows
    assert result.home_us == pytest.approx(cpu_us, rel=0.01)
    assert result.per_s == pytest.approx(1e6 / cpu_us, rel=0.05)


def test_fronts_add_up_until_home_or_the_engine_is_busy() -> None:
    few, more, many = (simulated(32, number) for number in (2, 5, 25))
    assert more.per_s > 2.5 * few.per_s
    assert many.limit == "home"
    # At full batches, with a pair of datagrams for all requests, or for each.
    least_us, most_us = (0.5 + 0.75 + (60.0 + 20.0 * pairs) / 64 for pairs in (1, 64))
    assert 1e6 / most_us < many.per_s < 1e6 / least_us
    slow = simulated(32, 25, row_us=50.0)
    assert slow.limit == "engine"
    assert slow.per_s == pytest.approx(1e6 / (50.0 + 20.0 / 64), rel=0.1)


def test_processes_share_the_cores() -> None:
    narrow = simulated(2, 9)
    assert narrow.limit == "cores"
    assert narrow.per_s == pytest.approx(2e6 / narrow.all_us, rel=0.05)
    assert simulated(16, 9).per_s > 2 * narrow.per_s


@pytest.mark.parametrize(
    ("load", "connections", "measured"),
    [("tiny-json", 256, 1.21), ("tiny-binary", 256, 1.17), ("row-json", 64, 1.59)],
)
def test_three_processes_on_two_cores_come_to_what_was_measured(
    load: str, connections: int, measured: float
) -> None:
    costs = msgspec.json.decode(process_costs.FILE.read_bytes(), type=dict[str, Costs])[load]
    one, three = (on_two_cores(costs, number, connections, 3000) for number in (1, 3))
    assert three.per_s / one.per_s == pytest.approx(measured, rel=0.15)


def test_costs_are_found_from_turns() -> None:
    us = {}
    for size in (1, 4, 16, 64):
        us["one", 1, size] = 8.0 * size + 64.0
        for fronts in (1, 4):
            us["home", fronts, size] = 0.5 * fronts * size + 20.0 * fronts + 60.0
        us["both", 1, size] = us["home", 1, size] + 10.0 * size + 40.0
    found = msgspec.to_builtins(process_costs.costs_of(us))
    assert found == pytest.approx(
        msgspec.to_builtins(COSTS) | dict.fromkeys(("one_apart", "front_apart", "home_apart", "client"), 0.0)
    )


@pytest.mark.parametrize("elements", [16, 50_176])
async def test_home_alone_answers_all_datagrams(elements: int) -> None:
    async with process_costs.home_alone(elements, 2, 20) as turn:
        for _ in range(3):
            await turn()
