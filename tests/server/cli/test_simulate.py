"""`cobatch simulate` and `cobatch profile`: figures, files, refusals."""

from __future__ import annotations

import json
import sys
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


def test_goodput_is_simulated_at_several_loads(tmp_path: Path) -> None:
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    shown = done(
        "simulate", "bert-large-a100", "--deadline-ms", "100", "--load", "0.5,0.9", "--requests", "3000",
        "--json", figures, "--plot", plot,
    )  # fmt: skip
    assert "of bound" in shown
    runs = json.loads(figures.read_text())["runs"]
    assert [run["load"] for run in runs] == [0.5, 0.9]
    assert runs[0]["total"]["goodput"] == pytest.approx(runs[0]["bound"], rel=0.1)
    root = ET.fromstring(plot.read_text())
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"cobatch", "bound", "goodput per second"} <= set(texts)


def test_the_scheduler_has_the_settings_of_the_server() -> None:
    # At a low load requests leave alone without a delay.
    arguments = ("simulate", "bert-large-a100", "--load", "0.3", "--requests", "2000")
    assert "delay" not in done(*arguments)
    delayed = done(*arguments, "--max-delay-ms", "50")
    assert "delay" in delayed
    assert (
        done(*arguments, "--max-delay-ms", "50", "--latency-target-ms", "30").splitlines()[2] not in delayed
    )


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


def test_a_trace_and_a_closed_loop(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("".join(f"{number / 100},1\n" for number in range(200)))
    assert "simulated 199 requests" in done("simulate", "resnet50-v100", "--arrivals", trace)
    assert "dispatch reasons" in done("simulate", "resnet50-v100", "--connections", "8", "--seconds", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tenant", "gold"], "key=value"),
        (["--tenant", "speed=1"], "no setting 'speed'"),
        (["--tenant", "share=most"], "'most' is not a valid share"),
        (["--plot", "figure.bmp"], ".svg, .png or .pdf"),
        (["--load", "high"], "expected numbers"),
        (["--rate", "0"], "more than 0"),
        (["--router", "dice"], "round-robin"),
        (["--arrivals", "sometimes"], "poisson, constant, bursty, diurnal or a trace file"),
        (["--deadline-ms", "1"], "no run is as short"),
        (["--rate", "9", "--load", "0.5"], "--rate and --load exclude each other"),
        (["--connections", "9", "--load", "0.8"], "--load and --connections exclude each other"),
        (["--connections", "9", "--arrivals", "bursty"], "--connections and --arrivals exclude each other"),
        (["--rate", "9", "--arrivals", "trace.csv"], "--rate and --arrivals exclude each other"),
    ],
)
def test_an_invalid_option_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'cobatch[plots]'" in refused("--plot", "goodput.svg")


def test_a_missing_profile_is_refused() -> None:
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
    assert "dispatch reasons" in done("simulate", output, "--requests", "1000")


def test_a_model_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    result = command("profile", tmp_path / "none.onnx")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
