"""`cobatch simulate` and `cobatch profile`: figures, files, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import typer
from onnx import TensorProto, helper
from typer.testing import CliRunner, Result

from cobatch.server.cli.simulate import profile, simulate

APP = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
APP.command("simulate")(simulate)
APP.command("profile")(profile)


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(APP, [str(argument) for argument in arguments])


def done(*arguments: str | Path) -> str:
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str | Path) -> str:
    result = command("simulate", "resnet50-v100", *arguments)
    assert result.exit_code == 2
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    return line


def test_the_included_profiles_are_listed_with_their_sources() -> None:
    lines = done("simulate", "--list").splitlines()
    assert any(line.startswith("bert-large-a100: ") and "github.com" in line for line in lines)


def test_policies_are_compared_at_several_loads(tmp_path: Path) -> None:
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    shown = done(
        "simulate", "bert-large-a100", "--deadline-ms", "100", "--load", "0.5,0.9", "--requests", "3000",
        "--policy", "cobatch", "--policy", "triton:preferred=32/64,delay_ms=5",
        "--json", figures, "--plot", plot,
    )  # fmt: skip
    assert "of bound" in shown
    assert shown.count("triton:preferred=32/64,delay_ms=5") == 2
    runs = json.loads(figures.read_text())["runs"]
    assert [(run["policy"], run["load"]) for run in runs] == [
        (policy, load) for load in (0.5, 0.9) for policy in ("cobatch", "triton:preferred=32/64,delay_ms=5")
    ]
    assert runs[0]["total"]["goodput"] == pytest.approx(runs[0]["bound"], rel=0.1)
    root = ET.fromstring(plot.read_text())
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"cobatch", "bound", "goodput per second"} <= set(texts)


def test_tenants_and_nodes(tmp_path: Path) -> None:
    plot = tmp_path / "sizes.svg"
    shown = done(
        "simulate", "resnet50-v100", "--rate", "2000", "--seconds", "1", "--nodes", "2",
        "--router", "least-loaded", "--arrivals", "bursty", "--plot", plot,
        "--tenant", "name=gold,weight=4,priority=1,deadline_ms=100", "--tenant", "name=other,share=3,rows=2",
    )  # fmt: skip
    assert "gold" in shown
    assert "other" in shown
    ET.fromstring(plot.read_text())


def test_a_trace_and_callers_that_wait(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("".join(f"{number / 100},1\n" for number in range(200)))
    assert "cobatch" in done("simulate", "resnet50-v100", "--arrivals", trace)
    assert "cobatch" in done("simulate", "resnet50-v100", "--connections", "8", "--seconds", "1")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policy", "best"], "expected one of cobatch, fixed-window"),
        (["--policy", "fixed-window"], "fixed-window needs window_ms"),
        (["--policy", "triton:speed=1"], "no 'speed'"),
        (["--policy", "triton:delay_ms=soon"], "'soon' is no value for delay_ms"),
        (["--tenant", "gold"], "key=value"),
        (["--load", "high"], "expected numbers"),
        (["--rate", "0"], "more than 0"),
        (["--router", "dice"], "round-robin"),
        (["--arrivals", "sometimes"], "a trace's file"),
        (["--deadline-ms", "1"], "no run is as short"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: list[str], says: str) -> None:
    assert says in refused(*arguments)


def test_a_profile_that_is_not_there_is_refused() -> None:
    result = command("simulate", "nothing.json")
    assert result.exit_code == 2
    assert "bert-large-a100" in result.stderr


def test_a_model_is_measured_and_simulated(tmp_path: Path) -> None:
    model, output = tmp_path / "sum.onnx", tmp_path / "sum.json"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 16])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    opset = [helper.make_opsetid("", 17)]
    model.write_bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())
    done("profile", model, "--max-batch-size", "8", "--seconds", "0", "-o", output)
    document = json.loads(output.read_text())
    assert [run["rows"] for run in document["runs"]] == [1, 2, 3, 4, 6, 8]
    assert {"p0", "p50", "p99", "p100"} <= set(document["runs"][0]["us"])
    assert "onnxruntime" in document["source"]
    assert "cobatch" in done("simulate", output, "--requests", "1000")


def test_a_model_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    result = command("profile", tmp_path / "none.onnx")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
